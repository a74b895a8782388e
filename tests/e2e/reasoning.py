"""Chat templates of models that reason, and scripts for them; knows no moecli code.

The templates are written for these tests. They treat messages as the released ones do: gpt-oss's
refuses markup in a message and drops the reasoning of former turns unless a tool was called;
Qwen3's strips what stands before `</think>`, and its thinking models' begins the reasoning itself.
"""

HARMONY_SPECIALS = [
    "<|startoftext|>",
    "<|return|>",
    "<|call|>",
    "<|start|>",
    "<|channel|>",
    "<|message|>",
    "<|end|>",
    "<|constrain|>",
]
HARMONY_STOPS = ["<|return|>", "<|call|>"]
HARMONY_TEMPLATE = """
{{- '<|start|>system<|message|>Reasoning: medium<|end|>' }}
{%- set rest = messages %}
{%- if messages[0].role == 'system' %}
    {{- '<|start|>developer<|message|># Instructions\n\n' + messages[0].content + '<|end|>' }}
    {%- set rest = messages[1:] %}
{%- endif %}
{%- for message in rest %}
    {%- if message.role == 'assistant' %}
        {%- for field in ('content', 'thinking') %}
            {%- if '<|channel|>' in message[field] | default('') %}
                {{- raise_exception('markup in the field ' + field) }}
            {%- endif %}
        {%- endfor %}
        {%- if 'tool_calls' in message %}
            {%- if message.content and message.thinking %}
                {{- raise_exception('content and thinking beside a call') }}
            {%- endif %}
            {%- if message.thinking %}
                {{- '<|start|>assistant<|channel|>analysis<|message|>' + message.thinking }}
                {{- '<|end|>' }}
            {%- endif %}
            {%- set call = message.tool_calls[0].function %}
            {{- '<|start|>assistant to=functions.' + call.name + '<|channel|>commentary json' }}
            {{- '<|message|>' + call.arguments | tojson + '<|call|>' }}
        {%- else %}
            {{- '<|start|>assistant<|channel|>final<|message|>' + message.content + '<|end|>' }}
        {%- endif %}
    {%- else %}
        {{- '<|start|>user<|message|>' + message.content + '<|end|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}
"""

THINK_SPECIALS = ["<|endoftext|>", "<|im_end|>", "<|im_start|>"]
THINK_STOPS = ["<|im_end|>"]
THINK_TEXTS = ["<think>", "</think>"]
THINK_TEMPLATE = """
{%- for message in messages %}
    {%- set content = message.content %}
    {%- if message.role == 'assistant' and '</think>' in content %}
        {%- set content = content.split('</think>')[-1].lstrip('\n') %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}{BEGIN}
{%- endif %}
"""


def think_template(begins: bool) -> str:
    """`begins`: the prompt begins the reasoning, as for the 2507 thinking models."""
    return THINK_TEMPLATE.replace("{BEGIN}", "{{ '<think>\\n' }}" if begins else "")
