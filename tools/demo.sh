# What `make demo` runs once moecli is installed: quantize the embedded model, then talk to it
# with a memory budget that does not hold all of its experts.
set -eu

out=demo-out
say() { printf '\n$ %s\n' "$*"; }

if [ ! -e "$out" ]; then
    say moecli quantize demo -q int4 -o "$out"
    moecli quantize demo -q int4 -o "$out"
fi
say moecli run "$out" --ram 8MiB -v --temp 0 "'What is the capital of France?'"
moecli run "$out" --ram 8MiB -v --temp 0 'What is the capital of France?'
cat <<'EOF'

The model has 128 experts; the budget above holds some of them, the others were read from disk when
they were needed. What to type next:

  . .venv/bin/activate
  moecli chat                        talk to the same model
  moecli show demo-out               what it is made of
  moecli quantize DIR -q int4        your own Llama 4 or Qwen3-MoE checkpoint
EOF
