"""What ends a run early: signals, divergence, a compile that did nothing."""
import contextlib
import math
import signal

from torch._dynamo.utils import counters

from support.settings import Refused

DIVERGE_NATS = 1.0  # a loss this far above the lowest average of the run ...
DIVERGE_STEPS = 200  # ... for this many updates ...
DIVERGE_LINES = 5  # ... and log lines ends it
AVERAGED_LINES = 20  # that an average of logged losses is over: no odd batch makes it low
SAVE = getattr(signal, 'SIGUSR1', 0)  # Windows has neither it nor SIGHUP


class Stop(Exception):
    """Ends the run. reason is a word for the summary, code the exit code."""

    def __init__(self, reason, code, message):
        super().__init__(message)
        self.reason = reason
        self.code = code


@contextlib.contextmanager
def signals_noted(run):
    """Signals set run.stop_signal for the next step boundary. After one that stops, a second
    SIGTERM or Ctrl-C acts at once; a closing terminal may send SIGHUP twice."""
    def note(number, frame):
        if number == SAVE:
            run.stop_signal = run.stop_signal or SAVE
            return
        run.stop_signal = number
        for each in (signal.SIGTERM, signal.SIGINT):
            signal.signal(each, before[each])

    noted = [signal.SIGTERM, signal.SIGINT]
    if SAVE:
        noted.append(SAVE)
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as under nohup
            noted.append(signal.SIGHUP)
    before = {each: signal.signal(each, note) for each in noted}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def stop_if_signalled(run, stop, save):
    """Save and stop, or after SIGUSR1 only save. `stop` is the signal that any rank got, or 0."""
    if not stop:
        return
    name = signal.Signals(stop).name
    told = 'saved' if save(run) else 'its loss is too high, so it was not saved,'
    told = f'{name}: {told} at step {run.progress.step}'
    if stop != SAVE:
        raise Stop(name.lower(), 128 + stop, f'{told}; continue with --init_from=resume')
    run.log.say(told)
    if run.stop_signal == SAVE:
        run.stop_signal = 0


def stop_if_bad(run):
    step = run.bad_step.item()
    if step >= 0:
        run.progress.step = step  # gradients have been 0 since
        raise Stop('nan', 3, f'step {step + 1}: the loss or its gradient is not finite; the run '
                             'stopped before that update. Likely a learning rate too high or a '
                             'bad batch; the last checkpoint is from before it')
    if not weights_are_finite(run):
        raise Stop('nan', 3, f'step {run.progress.step}: a weight is not finite; nothing of this '
                             'step is saved. Likely a learning rate too high')


def weights_are_finite(run):
    """Not seen by the loss alone: an infinite key only gets no attention."""
    return all(math.isfinite(flat.masters.sum()) for flat in run.flats)


def highest_loss(run):
    """A loss above this is too high, but none is where masks were chosen since the last log line:
    pruning may cost more than DIVERGE_NATS."""
    p, interval = run.progress, run.settings.log_interval
    last_line = (p.step - 1) // interval * interval
    if run.pruner and run.pruner.masked_at > last_line and p.above_since < 0:
        return math.inf
    return p.lowest_average + DIVERGE_NATS


def guard_against_divergence(run, loss):
    """Follow the average of the logged losses. Stop once they have been too high for long."""
    s, p = run.settings, run.progress
    limit = highest_loss(run)
    p.average_loss += (loss - p.average_loss) / AVERAGED_LINES
    if limit == math.inf:  # the first line, or new masks
        p.average_loss = p.lowest_average = max(loss, p.average_loss)
    p.lowest_average = min(p.lowest_average, p.average_loss)
    if loss <= limit:
        p.above_since = -1
        return
    if p.above_since < 0:
        p.above_since = p.step
    above = (f'loss {loss:.3f} is more than {DIVERGE_NATS} nat above its lowest average '
             f'{p.lowest_average:.3f}')
    since = p.step - p.above_since
    if since >= max(DIVERGE_STEPS, DIVERGE_LINES * s.log_interval):
        raise Stop('diverged', 3, f'step {p.step}: diverged, {above} since step {p.above_since}. '
                                  f'Likely causes: learning_rate={s.learning_rate:g} too high, '
                                  f'warmup_iters={s.warmup_iters} too short, grad_clip='
                                  f'{s.grad_clip:g} (0: none). The last good checkpoint stays')
    if since == s.log_interval:  # one line alone may be an odd batch's
        run.log.say(f'WARNING: {above}')


NOTHING_COMPILED = ('compile=True, but nothing was compiled; unset TORCHDYNAMO_DISABLE and '
                    'TORCH_COMPILE_DISABLE, or use --compile=False')


def report_graphs(run):
    """Proof of compile: what Dynamo counted since set_up_model is read back, not assumed."""
    graphs = counters['stats']['unique_graphs'], sum(counters['graph_break'].values())
    if run.settings.compile and graphs[0] == 0:
        raise Refused(NOTHING_COMPILED)
    if run.graphs != graphs:
        run.graphs = graphs
        run.log.say(f'compiled graphs {graphs[0]}, graph breaks {graphs[1]}')
