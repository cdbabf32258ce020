"The event log: what it keeps, what survives a stop, what it costs, and that it never makes a GPU wait"
import csv, io, json, math, os, signal, subprocess, sys, time, types
from pathlib import Path
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from torch import nn
from fastai.callback.core import Callback
from fastai.callback.progress import ProgressCallback
from fastai.callback.schedule import LRFinder
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import AvgSmoothLoss, Learner
from posenb.callbacks import Precision
from posenb.log import (CSVFile, DeviceSmoothLoss, EventLog, JSONLines, LiveView, MemoryStats, Profile, TensorBoard, Terminal, WandB,
                        Writer, one_line, plot_log, read_log)

torch.set_num_threads(1)

class Parts(nn.Module):
    def forward(self, pred, y):
        loss = (pred - y).pow(2).mean()
        self.parts = dict(half=loss.detach()/2, third=loss.detach()/3)
        return loss

def tiny(path, n=64, **kwargs):
    torch.manual_seed(0)
    data = torch.utils.data.TensorDataset(torch.randn(n, 4), torch.randn(n, 1))
    learn = Learner(DataLoaders(DataLoader(data, bs=8), DataLoader(data, bs=8)), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1)),
                    Parts(), path=path, **kwargs)
    learn.remove_cb(ProgressCallback); learn.logger = lambda row: None
    return learn

class Lines(Writer):
    "Keeps the lines"
    def open(self, log): self.lines = []
    def write(self, line): self.lines.append(line)

clock = {'time', 'data_time', 'eta_seconds', 'max_mem'}
def timeless(lines): return [{k: v for k,v in l.items() if k not in clock} for l in lines]

# ---------------------------------------------------------------- a training without a network: the log's events, one after the other

def drive(log, learn, start=0, stop=None, n_epoch=3, n_iter=50, keep=None, value=lambda i: math.sin(i)):
    "The events of iterations `start` to `stop - 1` of a training; returns the log's state after iteration `keep - 1`"
    if log not in learn.cbs: learn.add_cb(log)
    learn.n_epoch,learn.n_iter,learn.training,learn.train_iter,learn.epoch = n_epoch,n_iter,True,start,start//n_iter
    learn.recorder.metric_names = ['epoch', 'train_loss', 'valid_loss', 'accuracy', 'time']
    log('before_fit')
    state = None
    for learn.epoch in range(start//n_iter, n_epoch):
        log('before_train')
        for learn.iter in range(learn.train_iter - learn.epoch*n_iter, n_iter):
            if learn.train_iter == stop: return state
            log('before_batch')
            learn.loss = torch.tensor(value(learn.train_iter))
            learn.loss_func.parts = dict(part=learn.loss*2) if learn.train_iter % 3 else {}
            learn.train_iter += 1
            log('after_batch')
            if learn.train_iter == keep: state = log.state_dict()
        learn.final_record = [.5, value(learn.train_iter), float('nan') if learn.epoch == 1 else learn.epoch + .25]
        log('after_epoch')
    log('after_fit')
    return state

@pytest.fixture(scope='module')
def learn(tmp_path_factory):
    learn = tiny(tmp_path_factory.mktemp('learn'))
    learn.create_opt()
    return learn

def fresh_log(learn, folder, **kwargs):
    learn.remove_cb(EventLog)
    return EventLog(folder, health=False, **kwargs)

@settings(max_examples=25, deadline=None)
@given(st.integers(1, 149), st.integers(0, 60), st.integers(1, 33), st.integers(1, 40), st.data())
def test_continued_run_writes_the_same_lines(tmp_path_factory, learn, keep, more, every, window, data):
    "Killed anywhere, continued from an earlier iteration: JSON and CSV end up as if nothing had happened"
    stop = min(keep + more, 150)
    whole,broken = tmp_path_factory.mktemp('whole'),tmp_path_factory.mktemp('broken')
    new = lambda folder: fresh_log(learn, folder, every=every, window=window, writers=[JSONLines(), CSVFile()])
    drive(new(whole), learn)
    state = json.loads(json.dumps(drive(new(broken), learn, stop=stop, keep=keep)))
    for f in broken.iterdir():                                    # the kill may cut the last line off
        if data.draw(st.booleans()): f.write_bytes(f.read_bytes() + b'{"iteration": 1')
    log = new(broken)
    log.load_state_dict(state)
    drive(log, learn, start=keep)
    assert timeless(read_log(broken/'metrics.jsonl')) == timeless(read_log(whole/'metrics.jsonl'))
    rows = [[{k: v for k,v in r.items() if k not in clock} for r in csv.DictReader(open(d/'metrics.csv'))] for d in (whole, broken)]
    assert [set(r.items()) for r in rows[0]] == [set(r.items()) for r in rows[1]]

def test_lines(learn, tmp_path):
    lines = Lines()
    drive(fresh_log(learn, tmp_path, every=20, window=5, writers=[lines]), learn)
    assert [l['iteration'] for l in lines.lines] == [19, 39, 49, 59, 79, 99, 99, 119, 139, 149]
    assert [l['iteration'] for l in lines.lines if l.get('end_of_epoch')] == [49, 99, 149]
    assert lines.lines[0]['total_loss'] == pytest.approx(np.median([np.float32(math.sin(i)) for i in range(15, 20)]), abs=1e-7)
    assert lines.lines[0]['part'] == pytest.approx(2*np.median([np.float32(math.sin(i)) for i in (13, 14, 16, 17, 19)]), abs=1e-7)
    ends = [l for l in lines.lines if l.get('end_of_epoch')]
    assert [l.get('accuracy') for l in ends] == [.25, None, 2.25]                # not evaluated in epoch 1
    left = [l['eta_seconds'] for l in lines.lines]
    assert left[-1] == 0 and all(l >= 0 for l in left)

def test_iteration_times_are_shared_between_fetches():
    log = EventLog()
    log.times = [(7, .001), (8, .001), (9, .598)]                # Python ran ahead of the device, then waited
    log._share_times()
    assert list(log.history('time').iterations) == [7, 8, 9]
    np.testing.assert_allclose(log.history('time').values, .2)

def test_new_run_moves_the_old_file(learn, tmp_path):
    for k in range(3): drive(fresh_log(learn, tmp_path, writers=[JSONLines(), CSVFile()]), learn, n_epoch=k+1, n_iter=20)
    assert [len(read_log(tmp_path/f)) for f in ('metrics-1.jsonl', 'metrics-2.jsonl', 'metrics.jsonl')] == [2, 4, 6]
    assert (tmp_path/'metrics-2.csv').exists()

def test_not_finite_is_valid_json(learn, tmp_path):
    drive(fresh_log(learn, tmp_path, every=5, writers=[JSONLines(), CSVFile()]), learn, n_epoch=1, n_iter=10,
          value=lambda i: math.nan if i > 4 else math.inf)
    forbid = lambda name: pytest.fail(f'{name} is no JSON')
    lines = [json.loads(l, parse_constant=forbid) for l in (tmp_path/'metrics.jsonl').read_text().splitlines()]
    assert [l['total_loss'] for l in lines if 'total_loss' in l] == [None, None]
    assert all(r['total_loss'] == '' for r in csv.DictReader(open(tmp_path/'metrics.csv')))

def test_killed_process_leaves_whole_lines(learn, tmp_path):
    "kill -9 in the middle: all lines written so far are in the file"
    drive(fresh_log(learn, tmp_path/'warm', writers=[]), learn, n_epoch=1)      # imports, before the fork
    child = os.fork()
    if child == 0:
        try: drive(fresh_log(learn, tmp_path, every=10), learn, stop=97)
        finally: os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert [l['iteration'] for l in read_log(tmp_path/'metrics.jsonl')] == [9, 19, 29, 39, 49, 49, 59, 69, 79, 89]

# ---------------------------------------------------------------- no waiting for the device

def test_values_stay_on_the_device_until_fetched():
    "A tensor on `meta` has no value: asking for one raises"
    log = EventLog(writers=[])
    for i in range(19):
        log.now = i
        log.put(total_loss=torch.ones((), device='meta', requires_grad=True), parts=torch.ones(3, device='meta', dtype=torch.float16))
    assert len(log.pending) == 19
    with pytest.raises(Exception): log.fetch()

def test_smooth_loss_stays_on_the_device():
    fake = types.SimpleNamespace(loss=torch.tensor(1.), iter=0, n_iter=100)
    smooth = DeviceSmoothLoss(every=20)
    smooth.accumulate(fake)
    fake.loss = torch.ones((), device='meta')
    for fake.iter in range(1, 20): smooth.accumulate(fake); assert smooth.value.item() == pytest.approx(1.)
    with pytest.raises(Exception): smooth.accumulate(fake)       # iteration 20 asks for the value

def test_smooth_loss_equals_fastais():
    ours,theirs = DeviceSmoothLoss(every=7),AvgSmoothLoss()
    for i in range(50):
        fake = types.SimpleNamespace(loss=torch.tensor(math.sin(i)), iter=i, n_iter=50)
        for metric in (ours, theirs): metric.accumulate(fake)
        if i % 7 == 0 or i == 49: assert ours.value.item() == pytest.approx(theirs.value.item(), abs=1e-7)

@pytest.mark.gpu
def test_no_synchronisation_on_a_gpu(tmp_path):
    learn = tiny(tmp_path)
    learn.create_opt()
    log = EventLog(tmp_path, every=20, health=False)
    learn.add_cb(log)
    learn.n_epoch,learn.n_iter,learn.training,learn.train_iter,learn.epoch,learn.iter = 1,1000,True,0,0,0
    log('before_fit'); log('before_train')
    learn.loss = torch.tensor(1., device='cuda')
    learn.loss_func.parts = dict(a=learn.loss*2)
    for learn.train_iter in range(19):
        torch.cuda.set_sync_debug_mode('error')
        try:
            log('before_batch'); learn.train_iter += 1; log('after_batch')
        finally: torch.cuda.set_sync_debug_mode('default')
    assert len(log.pending) == 19
    assert log.latest('a') == 2.

def test_cost(learn, tmp_path):
    "CPU time of the log in an iteration, with a line every 20 iterations"
    log = fresh_log(learn, tmp_path)
    best = math.inf
    for _ in range(3):
        began = time.process_time()
        drive(log, learn, n_epoch=1, n_iter=1000)
        best = min(best, (time.process_time() - began)/1000)
    print(f'{1e6*best:.0f} µs')
    assert best < .5e-3

# ---------------------------------------------------------------- with a real learner

def test_real_training(tmp_path):
    learn = tiny(tmp_path, splitter=lambda m: [list(m[0].parameters()), list(m[1].parameters())])
    log = EventLog(every=4, writers=[JSONLines(), CSVFile()], health=False)
    learn.fit(2, slice(1e-3, 1e-2), cbs=log)
    lines = read_log(tmp_path/'metrics.jsonl')
    assert [l['iteration'] for l in lines] == [3, 7, 7, 11, 15, 15]
    assert (lines[0]['lr_0'], lines[0]['lr_1']) == (1e-3, 1e-2)
    assert lines[0]['half'] == pytest.approx(lines[0]['total_loss']/2)
    assert lines[-1]['valid_loss'] == pytest.approx(float(learn.recorder.values[-1][1]))
    assert log.history('data_time').iterations[0] == 3                           # the first three are not timed
    plot_log(tmp_path/'metrics.jsonl'); plot_log(lines, ['half'])

def test_validation_and_lr_find_write_nothing(tmp_path):
    learn = tiny(tmp_path)
    log = EventLog(every=4, health=False)
    learn.add_cb(log)
    learn.fit(1)
    before = (tmp_path/'metrics.jsonl').read_text()
    learn.validate(); learn.get_preds()
    learn.fit(1, cbs=LRFinder(num_it=5))
    assert (tmp_path/'metrics.jsonl').read_text() == before and len(list(tmp_path.glob('metrics*'))) == 1
    assert len(log.history('total_loss')) == 8

def test_other_callbacks_put(tmp_path):
    class Norm(Callback):
        def after_backward(self): self.learn.event_log.put(norm=self.train_iter, smooth=False)
    learn = tiny(tmp_path)
    log = EventLog(every=4, health=False)
    learn.fit(1, cbs=[log, Norm()])
    assert [l['norm'] for l in read_log(tmp_path/'metrics.jsonl') if 'norm' in l] == [3, 7]
    with pytest.raises(KeyError, match='total_loss'): log.latest('nrom')

def test_scale_of_the_gradients(tmp_path):
    learn,lines = tiny(tmp_path),Lines()
    learn.fit(1, cbs=[precision := Precision('fp16', init_scale=2.**40, growth_interval=10**6), EventLog(every=2, writers=[lines], health=False)])
    scales = [l['grad_scale'] for l in lines.lines if 'grad_scale' in l]
    assert len(scales) == 4 and scales[-1] == precision.scaler.get_scale() and sorted(scales, reverse=True) == scales and scales[-1] < 2**40

def test_health_line_comes_once(tmp_path, capsys):
    tiny(tmp_path).fit(3, cbs=EventLog(writers=[]))
    assert capsys.readouterr().out.count('bound:') == 1

def test_profile_and_memory(tmp_path):
    learn,profile,memory = tiny(tmp_path),Profile(2, 100),MemoryStats(6, 100)        # training ends before the window does
    learn.fit(1, cbs=[profile, memory])
    marks = {e['name'] for e in json.loads(profile.file.read_text())['traceEvents'] if str(e.get('name')).startswith('iteration ')}
    assert marks == {f'iteration {i}' for i in range(2, 8)}
    assert any('addmm' in r['operator'] for r in profile.slowest(100))
    assert [r['iteration'] for r in memory.rows] == [6, 7] and memory.rows[0]['peak'] > 0

# ---------------------------------------------------------------- where lines go

class Tty(io.StringIO):
    def isatty(self): return True

@pytest.mark.parametrize('tty', [True, False])
def test_terminal(learn, tmp_path, monkeypatch, tty):
    out = (Tty if tty else io.StringIO)()
    monkeypatch.setattr(sys, 'stdout', out)
    drive(fresh_log(learn, tmp_path, every=10, writers=[Terminal()]), learn, n_epoch=2)
    monkeypatch.undo()
    text = out.getvalue()
    assert text.count('\n') == (2 if tty else 12) and ('\r' in text) == tty
    assert 'epoch 1/2  iter 10/100  total_loss' in text and 'eta 0:00:0' in text

def test_one_line():
    line = dict(iteration=19, epoch=0, total_loss=.51234, lr=1e-3, time=.0213, data_time=.001, eta_seconds=3725.4, max_mem=1234.)
    assert one_line(line, 3, 100) == 'epoch 1/3  iter 20/300  total_loss 0.512  lr 0.001  0.0213 s/iter, data 0.001  eta 1:02:05  1234 MiB'

def test_live_view_draws_seldom(learn, tmp_path, monkeypatch):
    "Drawings take a small share of the time, and the last state is drawn"
    view = LiveView(seconds=0., share=.02)
    drawn = []
    now = [0.]
    monkeypatch.setattr(LiveView, 'show', lambda self: (drawn.append(len(self.lines)), setattr(self, 'next', now[0] + max(self.seconds, .1/self.share))))
    monkeypatch.setattr(time, 'perf_counter', lambda: now.__setitem__(0, now[0] + .01) or now[0])
    drive(fresh_log(learn, tmp_path, every=5, writers=[view]), learn)
    assert len(drawn) <= 3 and drawn[-1] == len(view.lines) == 33
    assert [r['iteration'] for r in view.rows] == [49, 99, 149] and 'total_loss' in view.rows[0]

def test_missing_packages_are_named(monkeypatch):
    for name,writer in (('tensorboard', TensorBoard), ('wandb', WandB)):
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(ImportError, match=f'pip install {name}'): writer()

def test_tensorboard(learn, tmp_path, monkeypatch):
    calls = []
    class SummaryWriter:
        def __init__(self, folder, purge_step): calls.append((Path(folder).name, purge_step))
        def add_scalar(self, name, value, step): calls.append((name, value, step))
        def flush(self): pass
        def close(self): calls.append('close')
    monkeypatch.setitem(sys.modules, 'tensorboard', types.ModuleType('tensorboard'))
    monkeypatch.setitem(sys.modules, 'torch.utils.tensorboard', types.SimpleNamespace(SummaryWriter=SummaryWriter))
    log = fresh_log(learn, tmp_path, every=10, writers=[TensorBoard()])
    log.load_state_dict(dict(now=0, scalars={}, raw=[], fresh=[]))
    drive(log, learn, start=40, n_epoch=1)
    assert calls[0] == ('tensorboard', 40) and calls[-1] == 'close'
    assert ('lr', learn.opt.hypers[0]['lr'], 49) in calls and ('valid_loss', math.sin(50), 49) in calls

def test_wandb(learn, tmp_path, monkeypatch):
    calls = []
    run = types.SimpleNamespace(log=lambda d, step: calls.append((step, d)), finish=lambda: calls.append('finish'))
    fake = types.ModuleType('wandb'); fake.run = None; fake.init = lambda **kw: calls.append(kw) or run
    monkeypatch.setitem(sys.modules, 'wandb', fake)
    drive(fresh_log(learn, tmp_path, every=10, writers=[WandB(project='poses')]), learn, n_epoch=1)
    assert calls[0] == dict(dir=tmp_path, project='poses') and calls[-1] == 'finish'
    assert [c[0] for c in calls[1:-1]] == [9, 19, 29, 39, 49, 49] and 'total_loss' in calls[1][1]

# ---------------------------------------------------------------- two processes

two = '''
import sys, warnings; warnings.filterwarnings('ignore')
import torch, torch.distributed as dist
sys.path.insert(0, {tests!r}); sys.path.insert(0, {root!r})
from test_log import tiny, drive, EventLog, JSONLines, CSVFile, Terminal, DeviceSmoothLoss, AvgSmoothLoss
import types, math
dist.init_process_group('gloo')
rank = dist.get_rank()
learn = tiny({folder!r}); learn.create_opt()
log = EventLog({folder!r} + f'/rank{{rank}}', every=10, window=10, writers=[JSONLines(), Terminal()], health=False)
drive(log, learn, n_epoch=1, value=lambda i: float(i + rank))
ours = DeviceSmoothLoss()
for i in range(30): ours.accumulate(types.SimpleNamespace(loss=torch.tensor(float(rank)), iter=i, n_iter=30))
assert abs(ours.value.item() - .5) < 1e-6, ours.value
dist.barrier(); dist.destroy_process_group()
'''

def test_two_processes_average_and_rank_0_writes(tmp_path):
    here = Path(__file__).parent
    code = two.format(tests=str(here), root=str(here.parent), folder=str(tmp_path))
    env = {**os.environ, 'WORLD_SIZE': '2', 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(29500 + os.getpid() % 1000), 'OMP_NUM_THREADS': '1'}
    ranks = [subprocess.Popen([sys.executable, '-c', code], env={**env, 'RANK': str(r)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for r in range(2)]
    outs = [p.communicate(timeout=120) for p in ranks]
    assert [p.returncode for p in ranks] == [0, 0], outs
    assert outs[0][0].count('epoch 1/1') == 6 and outs[1][0] == ''
    assert not (tmp_path/'rank1').exists()
    lines = read_log(tmp_path/'rank0'/'metrics.jsonl')
    assert [l['total_loss'] for l in lines if 'end_of_epoch' not in l] == [5., 15., 25., 35., 45.]       # median of i, plus .5
