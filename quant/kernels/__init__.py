"""Fast versions of the ops in quant.ops, one package a kind of processor."""
