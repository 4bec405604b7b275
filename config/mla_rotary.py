"""Latent attention of width 128, half of each head rotary; all else is vanilla_baseline."""
out_dir = 'out/mla_rotary'
dataset = 'fineweb_edu'
dtype = 'bfloat16'
attention = 'mla'
latent_dim = 128  # the cache: 2 x 128 + 32 numbers a token and layer against 2 x 768
positions = 'rotary'
