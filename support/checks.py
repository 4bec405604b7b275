"""What of the settings alone can be known to be wrong, and which of them have no effect."""
import re

from model import model_config
from support.settings import changed

AT_LEAST_1 = '''batch_size gradient_accumulation_steps block_size n_layer n_head n_embd
    loss_chunk_tokens latent_dim max_iters prune_interval eval_interval log_interval
    save_interval'''.split()
AT_LEAST_0 = '''seed n_kv_head warmup_iters lr_decay_iters eval_tokens learning_rate min_lr
    weight_decay grad_clip spam_interval spam_warmup prune_lr_power'''.split()
AT_MOST = dict(batch_size=2**20, n_layer=10_000, n_embd=2**20, latent_dim=2**20, prune_lr_power=10)


def check(s, typed=()):
    """Problems of the Settings `s`: ranges, combinations, contradictions on the command line.

    typed: names of the settings that were typed there.
    """
    problems = []

    def require(condition, keys, must):
        if not condition:
            told = ' '.join(f'{key}={getattr(s, key)!r}' for key in keys.split())
            problems.append(f'{told}: {must}')

    for key in AT_LEAST_1:
        require(getattr(s, key) >= 1, key, 'must be at least 1')
    for key in AT_LEAST_0:
        require(getattr(s, key) >= 0, key, 'must not be negative')
    for key, most in AT_MOST.items():  # beyond any machine, and merely to try it takes for ever
        require(getattr(s, key) <= most, key, f'must be at most {most}')
    for key in ('beta1', 'beta2', 'dropout'):
        require(0 <= getattr(s, key) < 1, key, 'must be at least 0 and below 1')
    require(s.out_dir, 'out_dir', 'must not be empty')
    require(s.min_lr <= s.learning_rate, 'min_lr learning_rate', 'must not be above learning_rate')
    require(s.learning_rate * s.weight_decay < 1, 'learning_rate weight_decay',
            'their product must be below 1, or an update would remove all weights')
    decay_iters = s.lr_decay_iters or s.max_iters
    require(s.warmup_iters < decay_iters, 'warmup_iters max_iters lr_decay_iters',
            f'the warm-up must end before the decay does ({decay_iters})')
    require(0 < s.activation_budget <= 1, 'activation_budget', 'must be above 0 and at most 1')
    require(s.eval_tokens == 0 or s.eval_tokens >= s.block_size, 'eval_tokens block_size',
            'must hold at least one sequence; 0 scores the whole split')
    check_shapes(s, require)
    check_pruning(s, require)
    return problems + contradictions(s, typed)


def check_shapes(s, require):
    """Shapes of the model that do not fit each other."""
    config = model_config(s, vocab_size=1)
    if s.n_head >= 1:
        nearest = max(1, s.n_embd // s.n_head) * s.n_head
        require(s.n_embd % s.n_head == 0, 'n_embd n_head',
                f'the width must be a multiple of the heads, e.g. n_embd={nearest}')
        unit = 4 if s.attention == 'mla' else 2  # half of a latent head is rotary
        require(s.positions != 'rotary' or config.head_width % unit == 0, 'positions n_embd n_head',
                f'rotary positions need a head width that {unit} divides, not {config.head_width}')
    if s.n_kv_head > 0:
        require(s.n_head % s.n_kv_head == 0, 'n_head n_kv_head',
                'the heads must be a multiple of the key and value heads')
    require(s.ra_window >= -1, 'ra_window', 'must be at least 0, or -1 for all earlier tokens')
    require(not (config.windowed and s.dropout), 'dropout ra_window',
            'the window has no dropout; set --dropout=0 or --ra_window=-1')
    require(not (config.reciprocal and s.n_kv_head), 'n_kv_head ra_alpha ra_learned',
            'the reciprocal term exchanges query and key, so it needs a key for each head; '
            'set --n_kv_head=0')
    if s.fp8:
        require(not s.bias, 'fp8 bias', 'the products in float8 have no bias; set one to False')
        for key, unit in (('n_embd', 16), ('block_size', 16), ('loss_chunk_tokens', 64)):
            require(getattr(s, key) % unit == 0, f'fp8 {key}',
                    f'the products in float8 need a multiple of {unit}')


def check_pruning(s, require):
    """A ramp that does not fit into the run. The rest is found by building the Pruner."""
    require(s.prune_regrow >= 0 or s.prune_regrow == -1, 'prune_regrow',
            'must be at least 0, or -1 for pruned for good')
    if s.prune_score == 'zeros':
        require(s.init_from != 'scratch', 'prune_score init_from', 'keeps what is 0 at the start; '
                'start from a pruned model, --init_from=run:FOLDER or hf:FOLDER')
    if s.prune_score in ('none', 'zeros'):
        return
    require(0 <= s.prune_start < s.prune_end <= s.max_iters, 'prune_start prune_end max_iters',
            'the ramp must start before it ends and end within the run, e.g. --prune_start='
            f'{s.max_iters * 3 // 10} --prune_end={s.max_iters * 19 // 20}')
    at_once = s.prune_pattern == '2:4' and s.prune_regrow < 0
    last = 'prune_start' if at_once else 'prune_end'
    chosen = getattr(s, last)
    if s.optimizer == 'adamwspam' and 0 < s.spam_interval <= chosen:
        reset = chosen // s.spam_interval * s.spam_interval
        chosen = max(chosen, reset + s.spam_warmup + 1)  # it waits for the end of the warm-up
        require(chosen <= min(s.max_iters, reset + s.spam_interval - 1),
                f'{last} max_iters spam_interval spam_warmup', 'no masks are chosen in the warm-up '
                f'after the reset at {reset}, so target_sparsity would not be reached; set another '
                f'{last} or a shorter warm-up')


# --- settings without effect ----------------------------------------------------------------------


def idle_settings(s):
    """{name: what it needs, as a user would write it} of the settings that act on nothing.

    The settings that a need names are those that decide.
    """
    idle = {}

    def act_only(keys, needs, met):
        if not met:
            for key in keys.split():
                idle.setdefault(key, needs)

    act_only('latent_dim', 'attention=mla', s.attention == 'mla')
    act_only('n_kv_head', 'attention=mha', s.attention == 'mha')
    act_only('ra_window', 'ra_alpha or ra_learned', s.ra_alpha != 0 or s.ra_learned)
    act_only('activation_budget', 'compile=True', s.compile)
    act_only('spam_mode spam_interval spam_warmup', 'optimizer=adamwspam',
             s.optimizer == 'adamwspam')
    act_only('spam_warmup', 'spam_interval above 0', s.spam_interval > 0)
    act_only('target_sparsity prune_scope prune_allocation prune_lr_power prune_schedule '
             'prune_start prune_end prune_interval prune_regrow prune_pattern',
             'a prune_score', s.prune_score != 'none')
    act_only('optimizer', 'a prune_score, and is adamw',
             s.optimizer != 'adamwprune' or s.prune_score != 'none')
    act_only('prune_allocation', 'a prune_score other than bitter4, which has its own',
             s.prune_score != 'bitter4')
    act_only('target_sparsity prune_schedule prune_start prune_end prune_interval prune_regrow '
             'prune_allocation prune_pattern',
             'a prune_score other than zeros', s.prune_score != 'zeros')
    act_only('prune_schedule prune_allocation', 'prune_pattern=unstructured',
             s.prune_pattern == 'unstructured')
    return idle


def without_effect(s):
    """The idle_settings that differ from their defaults."""
    different = changed(s)
    return {key: needs for key, needs in idle_settings(s).items() if key in different}


def contradictions(s, typed):
    """Problems: settings typed on the command line that others typed there deprive of effect."""
    problems = []
    for key, needs in without_effect(s).items():
        deciders = [word for word in re.findall(r'\w+', needs) if word in vars(s)]
        others = [name for name in deciders if name in typed]
        if key in typed and others:
            told = ' '.join(f'{name}={getattr(s, name)!r}' for name in others)
            problems.append(f'{key}={getattr(s, key)!r} {told}: acts only with {needs}; '
                            'leave one of them out')
    return problems
