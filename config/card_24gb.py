"""vanilla_baseline for a card of 24 GB: micro-batches of 64.

An H200 whose process was capped at 22.5 GiB reserved 18.33 GiB, pruning included. CUDA and its
libraries come on top, 0.75 GiB with card_12gb. It has not run on a card of 24 GB.
"""
out_dir = 'out/card_24gb'
dataset = 'fineweb_edu'
dtype = 'bfloat16'
batch_size = 64
gradient_accumulation_steps = 2
loss_chunk_tokens = 16384
