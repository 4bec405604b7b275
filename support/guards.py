"""What ends a run early: signals, divergence, a compile that did nothing."""
import contextlib
import signal

from torch._dynamo.utils import counters

from support.settings import Refused

DIVERGE_NATS = 1.0  # a loss this far above its running best ...
DIVERGE_STEPS = 200  # ... for this many updates ends the run


class Stop(Exception):
    """Ends the run. reason is a word for the summary, code the exit code."""

    def __init__(self, reason, code, message):
        super().__init__(message)
        self.reason = reason
        self.code = code


@contextlib.contextmanager
def signals_noted(run):
    """SIGTERM and Ctrl-C set run.stop_signal for the next step boundary; a second acts at once."""
    def note(number, frame):
        run.stop_signal = number
        for each, handler in before.items():
            signal.signal(each, handler)

    before = {each: signal.signal(each, note) for each in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def guard_against_divergence(run, loss):
    """Stop once the loss has stayed DIVERGE_NATS above its running best for DIVERGE_STEPS."""
    s, p = run.settings, run.progress
    p.lowest_loss = min(p.lowest_loss, loss)
    above = f'loss {loss:.3f} is more than {DIVERGE_NATS} nat above its best {p.lowest_loss:.3f}'
    if loss <= p.lowest_loss + DIVERGE_NATS:
        p.above_since = -1
    elif p.above_since < 0:
        p.above_since = p.step
        run.log.say(f'WARNING: {above}; nothing is saved until it is back')
    elif p.step - p.above_since >= DIVERGE_STEPS:
        raise Stop('diverged', 3, f'step {p.step}: diverged, {above} since step {p.above_since}. '
                                  f'Likely causes: learning_rate={s.learning_rate:g} too high, '
                                  f'warmup_iters={s.warmup_iters} too short, grad_clip='
                                  f'{s.grad_clip:g} (0: none). The last good checkpoint stays')


NOTHING_COMPILED = ('compile=True, but nothing was compiled; unset TORCHDYNAMO_DISABLE and '
                    'TORCH_COMPILE_DISABLE, or use --compile=False')


def report_graphs(run):
    """Proof of compile: what Dynamo counted since set_up_model is read back, not assumed."""
    graphs = counters['stats']['unique_graphs']
    breaks = sum(counters['graph_break'].values())
    if run.settings.compile and graphs == 0:
        raise Refused(NOTHING_COMPILED)
    if run.graphs != (graphs, breaks):
        run.graphs = (graphs, breaks)
        run.log.say(f'compiled graphs {graphs}, graph breaks {breaks}')
