"""Knows the small Python functions: what each is asked as, its body, and the checks it must pass."""

# name | argument names | requests (separated by /) | body (indented lines separated by ~) | checks (separated by ;)
_RAW = """is_prime|n|checks if a number is prime/tests whether n is prime/tells whether a number is prime|if n < 2:~    return False~for i in range(2, int(n ** 0.5) + 1):~    if n % i == 0:~        return False~return True|f(7) is True;f(9) is False;f(1) is False;f(2) is True
factorial|n|computes the factorial of n/returns the factorial of a number|result = 1~for i in range(2, n + 1):~    result *= i~return result|f(0) == 1;f(5) == 120
fibonacci|n|returns the n-th Fibonacci number/computes Fibonacci numbers|a, b = 0, 1~for _ in range(n):~    a, b = b, a + b~return a|f(0) == 0;f(1) == 1;f(10) == 55
is_even|n|checks if a number is even/tells whether n is even|return n % 2 == 0|f(4) is True;f(3) is False
is_odd|n|checks if a number is odd/tells whether n is odd|return n % 2 == 1|f(4) is False;f(3) is True
add|a, b|adds two numbers/returns the sum of two numbers|return a + b|f(2, 3) == 5
subtract|a, b|subtracts b from a/returns the difference of two numbers|return a - b|f(5, 3) == 2
multiply|a, b|multiplies two numbers/returns the product of two numbers|return a * b|f(4, 3) == 12
square|x|returns the square of a number/squares a number|return x * x|f(4) == 16
cube|x|returns the cube of a number|return x ** 3|f(3) == 27
absolute|x|returns the absolute value of a number|return -x if x < 0 else x|f(-3) == 3;f(2) == 2
maximum|a, b|returns the larger of two numbers|return a if a > b else b|f(2, 9) == 9;f(9, 2) == 9
minimum|a, b|returns the smaller of two numbers|return a if a < b else b|f(2, 9) == 2;f(9, 2) == 2
reverse_string|s|reverses a string/returns a string backwards|return s[::-1]|f('abc') == 'cba'
is_palindrome|s|checks if a string is a palindrome/tells whether a word is a palindrome|s = s.lower()~return s == s[::-1]|f('level') is True;f('cat') is False
count_vowels|s|counts the vowels in a string/returns the number of vowels in a text|return sum(1 for c in s.lower() if c in "aeiou")|f('banana') == 3;f('sky') == 0
count_words|s|counts the words in a string/returns the number of words in a text|return len(s.split())|f('a b c') == 3
sum_list|numbers|returns the sum of a list/adds up all numbers in a list|total = 0~for x in numbers:~    total += x~return total|f([1, 2, 3]) == 6;f([]) == 0
average|numbers|returns the average of a list/computes the mean of a list of numbers|if not numbers:~    return 0~return sum(numbers) / len(numbers)|f([1, 2, 3]) == 2
largest|numbers|finds the largest number in a list/returns the biggest number in a list|best = numbers[0]~for x in numbers:~    if x > best:~        best = x~return best|f([3, 9, 2]) == 9
smallest|numbers|finds the smallest number in a list/returns the least number in a list|best = numbers[0]~for x in numbers:~    if x < best:~        best = x~return best|f([3, 9, 2]) == 2
unique|items|removes duplicates from a list/returns the unique items of a list|result = []~for x in items:~    if x not in result:~        result.append(x)~return result|f([1, 2, 1]) == [1, 2]
reverse_list|items|reverses a list|return items[::-1]|f([1, 2, 3]) == [3, 2, 1]
evens|numbers|returns the even numbers of a list/keeps only the even numbers of a list|return [x for x in numbers if x % 2 == 0]|f([1, 2, 3, 4]) == [2, 4]
odds|numbers|returns the odd numbers of a list/keeps only the odd numbers of a list|return [x for x in numbers if x % 2 == 1]|f([1, 2, 3, 4]) == [1, 3]
double_all|numbers|doubles every number in a list|return [2 * x for x in numbers]|f([1, 2]) == [2, 4]
squares|n|returns the squares of the numbers from 1 to n|return [i * i for i in range(1, n + 1)]|f(3) == [1, 4, 9]
gcd|a, b|computes the greatest common divisor of two numbers/returns the gcd of two numbers|while b:~    a, b = b, a % b~return a|f(12, 18) == 6;f(7, 5) == 1
lcm|a, b|computes the least common multiple of two numbers|x, y = a, b~while y:~    x, y = y, x % y~return a * b // x|f(4, 6) == 12
power|base, exponent|raises a number to a power/computes a power|result = 1~for _ in range(exponent):~    result *= base~return result|f(2, 5) == 32;f(3, 0) == 1
sum_to|n|returns the sum of the numbers from 1 to n/adds the numbers from 1 to n|return n * (n + 1) // 2|f(10) == 55
digit_sum|n|returns the sum of the digits of a number/adds up the digits of a number|return sum(int(d) for d in str(n))|f(123) == 6
count_digits|n|counts the digits of a number|return len(str(abs(n)))|f(1234) == 4
celsius_to_fahrenheit|c|converts Celsius to Fahrenheit|return c * 9 / 5 + 32|f(100) == 212
fahrenheit_to_celsius|f|converts Fahrenheit to Celsius|return (f - 32) * 5 / 9|f(212) == 100
count_char|s, c|counts how often a character occurs in a string|return s.count(c)|f('banana', 'a') == 3
first|items|returns the first item of a list|return items[0]|f([5, 6]) == 5
last|items|returns the last item of a list|return items[-1]|f([5, 6]) == 6
contains|items, x|checks if a list contains an item|return x in items|f([1, 2], 2) is True;f([1], 3) is False
index_of|items, x|returns the position of an item in a list or -1|for i, y in enumerate(items):~    if y == x:~        return i~return -1|f([4, 5], 5) == 1;f([4], 7) == -1
capitalize_words|s|capitalizes every word in a string|return " ".join(w.capitalize() for w in s.split())|f('ab cd') == 'Ab Cd'
sort_numbers|numbers|sorts a list of numbers|return sorted(numbers)|f([3, 1, 2]) == [1, 2, 3]
bubble_sort|items|sorts a list with bubble sort|items = list(items)~for i in range(len(items)):~    for j in range(len(items) - 1 - i):~        if items[j] > items[j + 1]:~            items[j], items[j + 1] = items[j + 1], items[j]~return items|f([3, 1, 2]) == [1, 2, 3]
fizzbuzz|n|returns Fizz, Buzz or FizzBuzz for a number/plays FizzBuzz|if n % 15 == 0:~    return "FizzBuzz"~if n % 3 == 0:~    return "Fizz"~if n % 5 == 0:~    return "Buzz"~return str(n)|f(3) == 'Fizz';f(5) == 'Buzz';f(15) == 'FizzBuzz';f(7) == '7'
is_leap_year|year|checks if a year is a leap year|return year % 4 == 0 and (year % 100 != 0 or year % 400 == 0)|f(2000) is True;f(1900) is False;f(2024) is True
flatten|lists|flattens a list of lists|return [x for part in lists for x in part]|f([[1], [2, 3]]) == [1, 2, 3]
join_words|words|joins words with spaces|return " ".join(words)|f(['a', 'b']) == 'a b'
longest_word|s|finds the longest word in a string/returns the longest word of a text|return max(s.split(), key=len)|f('a bcd ef') == 'bcd'
is_positive|n|checks if a number is positive|return n > 0|f(3) is True;f(-1) is False
divisors|n|returns the divisors of a number/lists all divisors of n|return [i for i in range(1, n + 1) if n % i == 0]|f(6) == [1, 2, 3, 6]"""


class Task:
    """One function the model can be asked for."""

    def __init__(self, line: str):
        self.name, self.args, asks, body, checks = line.split("|")
        self.asks = asks.split("/")
        self.checks = checks.split(";")
        self.body = "\n".join("    " + part for part in body.split("~"))

    @property
    def code(self) -> str:
        return f"def {self.name}({self.args}):\n{self.body}"

    def passes(self, code: str) -> bool:
        """Whether the code, run in this process, defines the function and passes the checks."""
        space: dict = {}
        exec(code, space)
        return all(eval(check, {"f": space[self.name]}) for check in self.checks)


TASKS = [Task(line) for line in _RAW.split("\n")]
