"""vanilla_baseline in less memory: micro-batches of 16, norms and GELU computed again.

5.72 GiB were allocated on an H200. It has not run on a card of 6 or 8 GiB.
"""
out_dir = 'out/small_card'
dataset = 'fineweb_edu'
dtype = 'bfloat16'
batch_size = 16
gradient_accumulation_steps = 8
activation_budget = 0.9  # 10 widths a token and block are kept instead of 12
loss_chunk_tokens = 2048
