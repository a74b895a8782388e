"""Any MoE model that transformers knows: its own modules, with moecli's experts in them."""
