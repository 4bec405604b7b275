"""vanilla_baseline for a card of 8 GB: micro-batches of 16, norms and GELU computed again.

An H200 whose process was capped at 7.0 GiB reserved 5.95 GiB, pruning included; CUDA and its
libraries took 0.77 GiB beside (what was in use of a card of its own). 3% faster and 0.3 GiB
more with --activation_budget=1. It has not run on a card of 8 GB.
"""
out_dir = 'out/small_card'
dataset = 'fineweb_edu'
dtype = 'bfloat16'
batch_size = 16
gradient_accumulation_steps = 8
activation_budget = 0.9  # 10 widths a token and block are kept instead of 12
loss_chunk_tokens = 2048
