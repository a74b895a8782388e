# What `make demo` runs once moecli is installed: quantize the embedded model, then ask it for a
# story under a memory budget that does not hold all of its experts.
set -eu

out=demo-out
prompt='Tell me a short story about a fox named Vera.'

if [ ! -e "$out" ]; then
    echo "\$ moecli quantize demo -q int4 -o $out"
    moecli quantize demo -q int4 -o "$out"
fi
echo
echo "\$ moecli run $out --ram 16MiB --ctx 1024 --temp 0 -v \"$prompt\""
moecli run "$out" --ram 16MiB --ctx 1024 --temp 0 -v "$prompt" </dev/null
cat <<'EOF'

Not all of the model's 128 experts fit that budget; the others were read from disk when they were
wanted. What to type next:

  . .venv/bin/activate
  moecli chat                     talk to the same model
  moecli show demo-out            what it is made of
  moecli plan demo --ram 16MiB --ctx 1024   what lies where
  moecli quantize DIR -q int4     your own checkpoint: docs/models.md
EOF
