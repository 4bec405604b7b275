"""Latent attention of width 128 with half of each head rotary, on FineWeb-Edu; all else is vanilla_baseline. 6.55e9 tokens."""
out_dir = 'out/mla_rotary'
dataset = 'fineweb_edu'
dtype = 'bfloat16'
attention = 'mla'
latent_dim = 128  # the cache: 2 x 128 + 32 numbers a token and layer against 2 x 768
latent_rotary = 32  # numbers of each head's 64
