"Checkpoints: killed anywhere and gone on from there, a training ends where it would have ended; and nothing that is on the disk is half of something"
import json, multiprocessing, multiprocessing.forkserver, os, pickle, random, resource, shutil, signal, socket, subprocess, sys, time, warnings
from functools import partial
from pathlib import Path
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from torch import nn
from fastai.callback.core import Callback, CancelFitException
from fastai.callback.progress import ProgressCallback
from fastai.callback.tracker import EarlyStoppingCallback, SaveModelCallback
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner, Recorder
from fastai.optimizer import Adam, OptimWrapper
from posenb import checkpoint
from posenb.callbacks import EMA, Accumulate, ChannelsLast, CheckFinite, ClipGrad, EvalEvery, PreciseBN, Precision, SavePictures, reproducible
from posenb.checkpoint import (Checkpoint, checkpoint_weights, latest_checkpoint, list_checkpoints, load_matching, match_names, read_checkpoint,
                               write_checkpoint)
from posenb.distributed import distributed
from posenb.learner import adam, muon, pose_dls, pose_learner
from posenb.log import EventLog, JSONLines, read_log
from posenb.model import HigherHRNet, backbone_layers, higher_hrnet
from posenb.schedule import *

torch.set_num_threads(1)
here = Path(__file__).parent

# ---------------------------------------------------------------- two trainings

class Noisy:
    "Images and what is to be said about them; each look at one is another one, by all generators of random numbers"
    def __init__(self, n, seed): self.x = torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    def __len__(self): return len(self.x)
    def __getitem__(self, i): return self.x[i] + .1*torch.randn(3, 8, 8) + random.random() + float(np.random.rand()), self.x[i].mean()

def small_net(): return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(.3), nn.Flatten(), nn.Linear(512, 1), nn.Flatten(0))

def distance(pred, target): return (pred-target).abs().mean()

def noisy_learner(folder, workers=0, cbs=(), loader=partial(DataLoader, bs=4), opt_func=Adam, n=26, **kwargs):
    "A loader that knows nothing of epochs, dropout, batch normalisation"
    dls = DataLoaders(loader(Noisy(n, 0), shuffle=True, num_workers=workers), loader(Noisy(8, 1), num_workers=workers))
    dls.n_inp = 1
    return quiet(Learner(dls, small_net(), nn.MSELoss(), opt_func, metrics=distance, path=folder, cbs=list(cbs), **kwargs))

def people_learner(folder, workers=0, cbs=()):
    "Drawn people, `PoseDL`, a HigherHRNet of the smallest kind"
    dls = pose_dls(here.parent/'data'/'synth', size=64, bs=2, workers=workers, device='cpu')
    net = HigherHRNet(dls.skeleton.n, width=4, stem=4, layer1_block='basic', layer1_width=4, layer1_blocks=1, modules=(1,1,1), blocks=1, deconv_blocks=1, init='kaiming')
    learn = quiet(pose_learner(dls, model=net, path=folder, cbs=[EMA(.1), EventLog(folder, every=3, health=False), *cbs]))
    learn.metrics = [m for m in learn.metrics if m.name != 'AP']             # it takes longer than all the rest
    return learn

def quiet(learn):
    learn.remove_cb(ProgressCallback)
    learn.logger = lambda row: None
    return learn

def seed_all(seed=0): random.seed(seed); np.random.seed(seed); torch.manual_seed(seed)

def result(learn):
    "Everything in which two trainings could differ"
    r = learn.recorder
    return dict(weights={k: v.clone() for k,v in learn.model.state_dict().items()}, losses=torch.stack(list(r.losses)), lrs=list(r.lrs),
                values=[list(v) for v in r.values], iters=list(r.iters))

def assert_same(a, b):
    for k in a['weights']: assert torch.equal(a['weights'][k], b['weights'][k]), k
    assert torch.equal(a['losses'], b['losses'])
    assert a['lrs'] == b['lrs'] and a['iters'] == b['iters'] and repr(a['values']) == repr(b['values'])

# ---------------------------------------------------------------- killed processes

class Kill(Callback):
    "SIGKILL to this process, at an event of an iteration or while a checkpoint is written"
    order = 55
    def __init__(self, at, event):
        self.at = at
        if event == 'write': checkpoint._to_disk = lambda path: self.hit()
        else: setattr(self, event, self.hit)
    def hit(self):
        if self.at <= self.train_iter: os.kill(os.getpid(), signal.SIGKILL)

events = 'before_batch after_pred after_loss after_backward before_step after_step after_batch after_epoch before_validate after_validate write'.split()

def place_to_meet(rank, n_ranks, port):
    "As a launcher makes it; to be kept while the process lives"
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(n_ranks), MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port), ACCELERATE_USE_CPU='true',
                      TORCHELASTIC_USE_AGENT_STORE='True')
    return torch.distributed.TCPStore('127.0.0.1', port, is_master=True, wait_for_workers=False) if rank == 0 else None

def train(kind, folder, workers, epochs, iters, kill, rank, n_ranks, port):
    "A process: trains, or goes on, until it is done or killed"
    warnings.filterwarnings('ignore')
    torch.set_num_threads(1)
    multiprocessing.set_start_method('fork', force=True)
    store = place_to_meet(rank, n_ranks, port) if n_ranks > 1 else None
    seed_all()
    learn = dict(noisy=noisy_learner, people=people_learner)[kind](folder, workers)
    cbs = [Checkpoint(folder/'checkpoints', iters=iters, resume=True)] + ([Kill(*kill)] if kill else [])
    with distributed(learn, seed=0, silence=None): learn.fit_schedule(epochs, 5e-3, 'cosine', warmup_iters=4, cbs=cbs)
    if rank == 0: torch.save(result(learn), folder/'result.pt')

context = multiprocessing.get_context('forkserver')

@pytest.fixture(scope='module', autouse=True)
def server():
    "Processes begin as copies of one that has imported all this, and done nothing else"
    with pytest.MonkeyPatch.context() as m:
        m.setenv('PYTHONPATH', os.pathsep.join([str(here), str(here.parent)]))
        context.set_forkserver_preload(['test_checkpoint', 'accelerate', 'torch._dynamo'])     # the last two: what several processes need
        multiprocessing.forkserver.ensure_running()
    yield

def free_port():
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); return s.getsockname()[1]

def launch(kind, folder, workers=0, ranks=1, epochs=2, iters=3, kill=None, victim=0):
    "All processes of a training; True if it came to its end"
    folder.mkdir(exist_ok=True, parents=True)
    port = free_port() if ranks > 1 else 0
    processes = [context.Process(target=train, args=(kind, folder, workers, epochs, iters, kill if r == victim else None, r, ranks, port)) for r in range(ranks)]
    for p in processes: p.start()
    end = time.monotonic() + 300
    while any(p.is_alive() for p in processes) and time.monotonic() < end:
        if any(p.exitcode not in (None, 0) for p in processes):
            for p in processes: p.kill()
        time.sleep(.01)
    for p in processes: p.kill(); p.join()
    codes = [p.exitcode for p in processes]
    assert set(codes) <= ({0} if kill is None else {0, 1, -9}), codes      # 1: it found the killed one gone
    return set(codes) == {0}

references = {}
def reference(tmp_path_factory, *config):
    "A training that nobody stops"
    if config not in references:
        folder = tmp_path_factory.mktemp('whole')
        assert launch(config[0], folder, *config[1:])
        references[config] = torch.load(folder/'result.pt'),read_log(folder/'metrics.jsonl') if (folder/'metrics.jsonl').exists() else None
    return references[config]

def timeless(lines): return [{k: v for k,v in l.items() if k not in ('time', 'data_time', 'eta_seconds', 'max_mem')} for l in lines]

def check_kills(tmp_path_factory, kind, workers, ranks, kills):
    "Killed at each of these places, one after the other, then left to end"
    whole,lines = reference(tmp_path_factory, kind, workers if kind == 'noisy' else 0, ranks)        # samples of people do not depend on workers
    folder = tmp_path_factory.mktemp('broken')
    for at,event,victim in kills: launch(kind, folder, workers, ranks, kill=(at, event), victim=victim)
    assert launch(kind, folder, workers, ranks)
    assert_same(whole, torch.load(folder/'result.pt'))
    if lines: assert timeless(read_log(folder/'metrics.jsonl')) == timeless(lines)
    shutil.rmtree(folder)

n_iter = {('people', 1): 7, ('people', 2): 3, ('noisy', 1): 7, ('noisy', 2): 4}

def random_kills(kind, workers, ranks, n):
    "Iteration, event and rank, by iteration"
    rng = random.Random(f'{kind} {workers} {ranks}')
    victims = [rng.randrange(ranks) for _ in range(n)]
    return sorted((rng.randrange(1, 2*n_iter[kind, ranks]), rng.choice(events if v == 0 else events[:-1]), v) for v in victims)     # rank 0 writes

@pytest.mark.parametrize('kind,workers,ranks', [('noisy', 0, 1), ('noisy', 2, 1), ('noisy', 0, 2), ('noisy', 2, 2), ('people', 2, 2)])
def test_killed_run_ends_the_same(tmp_path_factory, kind, workers, ranks):
    check_kills(tmp_path_factory, kind, workers, ranks, random_kills(kind, workers, ranks, 2))

@pytest.mark.slow
@pytest.mark.parametrize('kind,workers,ranks', [(kind, workers, ranks) for kind in ('people', 'noisy') for ranks in (1, 2) for workers in (0, 2)])
def test_killed_twenty_times(tmp_path_factory, kind, workers, ranks):
    check_kills(tmp_path_factory, kind, workers, ranks, random_kills(kind, workers, ranks, 20))

# ---------------------------------------------------------------- ended otherwise

class Happen(Callback):
    "Calls a function of the learner at an event of an iteration"
    def __init__(self, at, event, f, order=55, again=False):
        self.at,self.f,self.order,self.again = at,f,order,again
        setattr(self, event, self.happen)
    def happen(self):
        if self.train_iter != self.at: return
        if not self.again: self.at = None
        self.f(self.learn)

def train_here(folder, *cbs, iters=5, epochs=2, options={}, **kwargs):
    "A training in this process, which goes on if there is something to go on with"
    seed_all()
    learn = noisy_learner(folder, **kwargs)
    learn.fit_schedule(epochs, 5e-3, 'cosine', warmup_iters=4, cbs=[Checkpoint(folder/'checkpoints', iters=iters, resume=True, **options), *cbs])
    return learn

def raise_it(error):
    def f(learn): raise error
    return f

@pytest.fixture(scope='module')
def whole(tmp_path_factory): return result(train_here(tmp_path_factory.mktemp('whole')))

@pytest.mark.parametrize('at,event', [*((at, event) for at in (2, 11) for event in events[:7]), *((7, event) for event in events[7:10])])
def test_errors_leave_a_place_to_go_on_from(tmp_path, whole, at, event):
    with pytest.raises(MemoryError): train_here(tmp_path, Happen(at, event, raise_it(MemoryError('full'))), iters=None, options=dict(epochs=None))
    written = [int(p.stem[-7:]) for p in list_checkpoints(tmp_path/'checkpoints')]
    assert written == ([] if event == 'after_step' else [at])            # then the weights are of no place
    assert_same(whole, result(train_here(tmp_path)))

@pytest.mark.parametrize('number,error', [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
@pytest.mark.parametrize('event', events[:-1])
def test_signals(tmp_path, whole, number, error, event):
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    at = 7 if event in events[7:10] else 5 if event == 'after_batch' else 4
    with pytest.raises(error): train_here(tmp_path, Happen(at, event, lambda learn: os.kill(os.getpid(), number)))
    assert handlers == [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    place = read_checkpoint(tmp_path/'checkpoints')['place']
    assert place['train_iter'] == (7 if at == 7 else 5)
    assert_same(whole, result(train_here(tmp_path)))

def test_asked_twice(tmp_path, whole):
    def twice(learn): os.kill(os.getpid(), signal.SIGINT); time.sleep(1.1); os.kill(os.getpid(), signal.SIGINT); time.sleep(.01)
    with pytest.raises(KeyboardInterrupt): train_here(tmp_path, Happen(4, 'after_loss', twice))
    assert read_checkpoint(tmp_path/'checkpoints')['place']['train_iter'] == 4
    assert_same(whole, result(train_here(tmp_path)))

def test_signals_in_one_moment_are_one(tmp_path, whole):
    "A cluster signals every process, and the launcher passes it on: also while the checkpoint is written"
    def often(*_):
        for s in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM): os.kill(os.getpid(), s)
    with pytest.MonkeyPatch.context() as m:
        to_disk = checkpoint._to_disk
        m.setattr(checkpoint, '_to_disk', lambda path: (often(), to_disk(path)))
        with pytest.raises(SystemExit) as e: train_here(tmp_path, Happen(3, 'after_loss', often))
    assert e.value.code == 143 and latest_checkpoint(tmp_path/'checkpoints').stem == 'checkpoint_0000004'
    with pytest.raises(KeyboardInterrupt): train_here(tmp_path, Happen(7, 'before_validate', lambda learn: [os.kill(os.getpid(), signal.SIGINT) for _ in range(2)]))
    assert_same(whole, result(train_here(tmp_path)))

class Poison(Callback):
    "The loss of an iteration becomes NaN; it costs the weights if nobody stops it"
    order = 1
    def __init__(self, at, everywhere=True): self.at,self.everywhere = at,everywhere
    def after_loss(self):
        if self.training and self.train_iter == self.at and self.everywhere: self.learn.loss_grad = self.learn.loss = self.learn.loss*float('nan')

def ending(what, folder, rank, port):
    "One of two processes whose training ends early; says how"
    warnings.filterwarnings('ignore')
    torch.set_num_threads(1)
    store = place_to_meet(rank, 2, port)
    seed_all()
    learn = noisy_learner(folder)
    signals = lambda learn: [os.kill(os.getpid(), getattr(signal, what)) for _ in range(3)]
    cbs = [CheckFinite(), Poison(2, rank == 1)] if what == 'nan' else [Happen(2, 'after_loss', signals)]
    try:
        with distributed(learn, seed=0): learn.fit_schedule(2, 5e-3, 'cosine', cbs=[Checkpoint(folder/'checkpoints'), *cbs])
    except BaseException as e: (folder/f'end{rank}').write_text(f'{type(e).__name__} {e}')
    if rank == 0: time.sleep(2)                                                # it has the place to meet

@pytest.mark.parametrize('what,end,at', [('SIGTERM', 'SystemExit 143', 4), ('SIGINT', 'KeyboardInterrupt', 4), ('nan', 'FloatingPointError', 2)])
def test_two_processes_end_together(tmp_path, what, end, at):
    port = free_port()
    processes = [context.Process(target=ending, args=(what, tmp_path, rank, port)) for rank in range(2)]
    for p in processes: p.start()
    for p in processes: p.join(120)
    for p in processes: p.kill()
    for rank in range(2): assert (tmp_path/f'end{rank}').read_text().startswith(end)
    state = read_checkpoint(tmp_path/'checkpoints')
    assert state['place']['train_iter'] == at and all(v.isfinite().all() for v in state['model'].values())

@pytest.mark.parametrize('every,iters', [(5, 1), (5, 3), (1, None), (4, None), (100, None)])
def test_no_weights_that_are_not_numbers(tmp_path, every, iters):
    with pytest.raises(FloatingPointError, match='at iteration 2 '): train_here(tmp_path, CheckFinite(every), Poison(2), iters=iters)
    found = list_checkpoints(tmp_path/'checkpoints')
    for path in found: assert all(v.isfinite().all() for v in read_checkpoint(path)['model'].values()), path
    assert [int(p.stem[-7:]) for p in found] == ([1, 2] if iters == 1 else [2] if every == 1 else [])

def test_interrupted_before_a_look(tmp_path, capsys):
    with pytest.raises(SystemExit): train_here(tmp_path, CheckFinite(100), Poison(2), Happen(4, 'after_loss', lambda learn: os.kill(os.getpid(), signal.SIGTERM)), iters=None)
    assert not list_checkpoints(tmp_path/'checkpoints') and 'there is no checkpoint' in capsys.readouterr().out

@pytest.mark.parametrize('iters', [2, 5])
def test_failed_evaluation_within_an_epoch(tmp_path, whole, iters):
    "The batch before it is done: that is a place to go on from"
    def fail(learn):
        if not learn.training: raise MemoryError('full')
    cbs = lambda: [EMA(.1, fast_start=True), EvalEvery(iters=4)]
    plain = result(train_here(tmp_path/'whole', *cbs()))
    with pytest.raises(MemoryError): train_here(tmp_path, *cbs(), Happen(4, 'after_pred', fail), iters=iters)
    assert latest_checkpoint(tmp_path/'checkpoints').stem == 'checkpoint_0000004'
    ended = result(train_here(tmp_path, *cbs()))
    for k in plain['weights']: assert torch.equal(plain['weights'][k], ended['weights'][k]), k

@pytest.mark.parametrize('at', [3, 6])
def test_a_failed_evaluation_is_made_up_for(tmp_path, at):
    "The weights are those after the step; what was to be known of them is measured when the training goes on, and may be the best"
    def fail(learn):
        if not learn.training: raise MemoryError('full')
    def train(folder, *cbs):
        often = EvalEvery(iters=3)
        learn = train_here(folder, often, EMA(.1), *cbs, options=dict(monitor='valid_loss'))
        return dict(result(learn), rows=often.rows, best=checkpoint_weights(folder/'checkpoints'/'best.safetensors'))
    plain = train(tmp_path/'plain')
    with pytest.raises(MemoryError): train(tmp_path/'with', Happen(at, 'after_pred', fail, again=True))
    assert read_checkpoint(tmp_path/'with'/'checkpoints')['place']['train_iter'] == at
    ended = train(tmp_path/'with')
    assert_same(plain, ended)
    assert plain['rows'] == ended['rows']
    for k,w in plain['best'].items(): assert torch.equal(w, ended['best'][k]), k

@pytest.mark.parametrize('at', [2, 8])
def test_out_of_memory_within_the_forward(tmp_path, whole, at):
    "Statistics of batch normalisation have moved already"
    def fragile(learn): learn.model[1].register_forward_hook(lambda m, i, o: raise_it(MemoryError('full'))(None) if learn.train_iter == at and learn.training else None)
    with pytest.raises(MemoryError): train_here(tmp_path, Happen(0, 'before_epoch', fragile))
    assert read_checkpoint(tmp_path/'checkpoints')['place']['train_iter'] == at
    assert_same(whole, result(train_here(tmp_path)))

cases = dict(
    sgd=dict(opt_func=partial(OptimWrapper, opt=partial(torch.optim.SGD, momentum=.9))), adamw=dict(opt_func=partial(OptimWrapper, opt=torch.optim.AdamW)),
    accumulated=dict(make=lambda: [Accumulate(3)]), averaged=dict(make=lambda: [EMA(.1, fast_start=True)]), bf16=dict(make=lambda: [Precision('bf16')]),
    fp16=dict(make=lambda: [Precision('fp16', init_scale=2.**20, growth_interval=3)]),
    often=dict(make=lambda: [EvalEvery(iters=3), EMA(.1)]), between=dict(make=lambda: [EvalEvery(iters=2), Accumulate(3)]),
    early=dict(make=lambda: [EarlyStoppingCallback('valid_loss', min_delta=10., patience=1)]), train_metrics=dict(train_metrics=True),
    torch_loader=dict(loader=lambda *args, **kwargs: torch.utils.data.DataLoader(*args, 4, generator=torch.Generator().manual_seed(3), **kwargs)))

def check_stops(tmp_path_factory, case, n):
    "Errors at `n` places, one after the other; then the training ends"
    kwargs,rng = dict(cases[case]),random.Random(case)
    make,train_metrics = kwargs.pop('make', list),kwargs.pop('train_metrics', False)
    def train(folder, *cbs):
        metrics = [Happen(0, 'before_fit', lambda learn: setattr(learn.recorder, 'train_metrics', True), order=0)] if train_metrics else []
        return train_here(folder, *make(), *metrics, *cbs, epochs=3, **kwargs)
    whole,folder = result(train(tmp_path_factory.mktemp('whole'))),tmp_path_factory.mktemp('broken')
    for at,event in sorted((rng.randrange(1, 20), rng.choice(events[:7])) for _ in range(n)):
        try: train(folder, Happen(at, event, raise_it(ArithmeticError('here'))))
        except ArithmeticError: pass
    assert_same(whole, result(train(folder)))

@pytest.mark.parametrize('case', cases)
def test_whatever_takes_part_goes_on(tmp_path_factory, case): check_stops(tmp_path_factory, case, 2)

@pytest.mark.slow
@pytest.mark.parametrize('case', cases)
def test_whatever_takes_part_goes_on_and_on(tmp_path_factory, case): check_stops(tmp_path_factory, case, 40)

def test_pictures_while_training(tmp_path):
    "Of people; the training does not notice, stopped and gone on neither"
    def train(folder, *cbs):
        seed_all()
        learn = people_learner(folder)
        learn.fit_schedule(2, 5e-3, 'cosine', cbs=[EvalEvery(iters=5), *cbs, Checkpoint(epochs=None, resume=True)])
        return result(learn)
    plain = train(tmp_path/'plain')
    pictures = lambda: SavePictures(2, max_n=1)
    with pytest.raises(MemoryError): train(tmp_path/'with', pictures(), Happen(7, 'after_loss', raise_it(MemoryError('full'))))
    assert_same(plain, train(tmp_path/'with', pictures()))
    assert [p.name for p in sorted((tmp_path/'with'/'pictures').iterdir())] == ['iteration_0000010.png', 'iteration_0000014.png']

@pytest.mark.gpu
@pytest.mark.parametrize('dtype,opt_func,compiled', [(None, adam, False), ('bf16', muon, False), ('fp16', adam, False), ('bf16', adam, True)])
def test_to_the_bit_on_a_gpu(tmp_path, dtype, opt_func, compiled):
    "With `reproducible()`; without it float32 differs from run to run"
    def train(folder, *cbs):
        dls = pose_dls(here.parent/'data'/'synth', size=128, bs=4, workers=2, device='cuda')
        torch.manual_seed(0)
        every = [ChannelsLast(), EMA(.05), ClipGrad(1.), CheckFinite(), *([Precision(dtype)] if dtype else []), Checkpoint(iters=2, resume=True)]
        learn = quiet(pose_learner(dls, 'tiny', opt_func=opt_func, path=folder, ap_every=0, cbs=every))
        if compiled: learn.model.compile()
        learn.fit_schedule(2, 5e-3, 'cosine', cbs=cbs)
        return {k: v.cpu() for k,v in result(learn).items() if k == 'losses'} | {k: v.cpu() for k,v in learn.model.state_dict().items()}
    try:
        reproducible(0)
        whole = train(tmp_path/'whole')
        with pytest.raises(MemoryError): train(tmp_path, Happen(4, 'after_loss', raise_it(MemoryError('full'))))
        ended = train(tmp_path)
    finally: reproducible(0, on=False)
    for k in whole: assert torch.equal(whole[k], ended[k]), k

@pytest.mark.parametrize('workers', [0, 2])
def test_second_pass_leaves_the_samples_alone(tmp_path, workers):
    "Samples depend on the epoch, which all copies of a dataset share with its workers: `PreciseBN` reads in the middle of it"
    def train(*cbs):
        seed_all()
        learn = people_learner(tmp_path/str(len(cbs)), workers, cbs=cbs)
        learn.fit_schedule(2, 5e-3, 'cosine')
        return torch.stack(list(learn.recorder.losses))
    assert torch.equal(train(EvalEvery(iters=3)), train(EvalEvery(iters=3), PreciseBN(2)))

# ---------------------------------------------------------------- files

def on_a_full_disk(folder, share):
    "Files of this process grow to `share` of a checkpoint and no further, after the first ones were written"
    warnings.filterwarnings('ignore')
    def fill(learn):
        size = max(p.stat().st_size for p in (folder/'checkpoints').iterdir())
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(share*size), resource.RLIM_INFINITY))
    try: train_here(folder, Happen(8, 'before_batch', fill))
    except OSError as e: (folder/'error').write_text(str(e))

@pytest.mark.parametrize('share', [.03, .5, .99])
def test_full_disk(tmp_path, whole, share):
    p = context.Process(target=on_a_full_disk, args=(tmp_path, share))
    p.start(); p.join(120)
    assert p.exitcode == 0 and 'Is the disk full?' in (tmp_path/'error').read_text()
    files = sorted(f.name for f in (tmp_path/'checkpoints').iterdir())
    assert files == ['checkpoint_0000005.safetensors', 'checkpoint_0000007.safetensors']
    assert read_checkpoint(tmp_path/'checkpoints')['place']['train_iter'] == 7
    assert_same(whole, result(train_here(tmp_path)))

dtypes = st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8, torch.bool])

@st.composite
def tensors(draw):
    shape = draw(st.lists(st.integers(0, 4), max_size=4))
    t = torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))).to(draw(dtypes))
    if t.ndim == 4 and draw(st.booleans()): t = t.contiguous(memory_format=torch.channels_last)
    return t[::2] if t.ndim and draw(st.booleans()) else t

numbers = st.one_of(st.none(), st.booleans(), st.integers(), st.floats())
arrays = tensors().filter(lambda t: t.dtype != torch.bfloat16).map(lambda t: t.contiguous().numpy())
states = st.recursive(st.one_of(numbers, st.text(), tensors(), arrays),
                      lambda s: st.one_of(st.lists(s, max_size=3), st.tuples(s, s), st.dictionaries(st.one_of(st.text(), st.integers(), st.just('__tensor__')), s, max_size=3)), max_leaves=8)

def same(a, b):
    if isinstance(a, torch.Tensor): return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.nan_to_num(nan=7) if a.is_floating_point() else a, b.nan_to_num(nan=7) if a.is_floating_point() else b)
    if isinstance(a, np.ndarray): return a.dtype == b.dtype and np.array_equal(a, b, equal_nan=a.dtype.kind == 'f')
    if isinstance(a, dict): return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)): return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and (a == b or a != a and b != b)

@settings(max_examples=100, deadline=None)
@given(states)
def test_what_was_written_is_read(tmp_path_factory, state):
    path = tmp_path_factory.getbasetemp()/'state.safetensors'
    assert same(read_checkpoint(write_checkpoint(path, state)), state)

def test_shared_and_ordered_tensors(tmp_path):
    w = torch.randn(8, 4, 3, 3).contiguous(memory_format=torch.channels_last)
    path = write_checkpoint(tmp_path/'a.safetensors', dict(a=w, b=[w], part=torch.zeros(1000)[:2]))
    state = read_checkpoint(path)
    assert state['a'].stride() == w.stride() and torch.equal(state['a'], w) and state['a'] is not None
    assert path.stat().st_size < 2*w.nbytes

@settings(max_examples=60, deadline=None)
@given(st.data())
def test_damage_is_noticed(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp()
    content = write_checkpoint(folder/'good.safetensors', dict(w=torch.arange(30.), text='abc', n=[1, 2])).read_bytes()
    at,bit = data.draw(st.integers(0, len(content)-1)),data.draw(st.integers(0, 7))
    changed = content[:at] if data.draw(st.booleans()) else content[:at] + bytes([content[at] ^ (1 << bit)]) + content[at+1:]
    (folder/'bad.safetensors').write_bytes(changed)
    try: state = read_checkpoint(folder/'bad.safetensors')
    except ValueError as e: assert 'bad.safetensors' in str(e)
    else: assert same(state, dict(w=torch.arange(30.), text='abc', n=[1, 2]))       # a blank for a blank in the header

class Program:
    def __init__(self, path): self.path = path
    def __reduce__(self): return Path.touch, (self.path,)

@pytest.mark.parametrize('write', [torch.save, lambda x, path: path.write_bytes(pickle.dumps(x)), lambda x, path: path.write_bytes(pickle.dumps(x, 2)),
                                   partial(torch.save, _use_new_zipfile_serialization=False)])
def test_no_program_runs(tmp_path, write):
    for name in ('a.safetensors', 'a.pth'):
        write(dict(state_dict=Program(tmp_path/'was_here')), tmp_path/name)
        for read in (read_checkpoint, checkpoint_weights, partial(load_matching, small_net())):
            with pytest.raises(ValueError): read(tmp_path/name)
    assert not (tmp_path/'was_here').exists()

def test_names_of_other_files(tmp_path):
    for name in ('best', 'checkpoint_x', 'checkpoint_0000012', 'checkpoint_0000003', '.checkpoint_0000020'): write_checkpoint(tmp_path/f'{name}.safetensors', {})
    assert [p.stem for p in list_checkpoints(tmp_path)] == ['checkpoint_0000003', 'checkpoint_0000012'] and latest_checkpoint(tmp_path).stem == 'checkpoint_0000012'
    with pytest.raises(FileNotFoundError, match='nowhere'): read_checkpoint(tmp_path/'nowhere')
    torch.save({}, tmp_path/'w.pth')

# ---------------------------------------------------------------- which ones are kept

class Scripted(Callback):
    "Writes a value for each epoch into the Recorder's column of the metric"
    order = 51
    def __init__(self, values): self.values = values
    def after_validate(self): self.recorder.log[-1] = self.values[self.epoch]

@settings(max_examples=12, deadline=None, derandomize=True)
@given(st.lists(st.one_of(st.just(float('nan')), st.floats(-2, 2)), min_size=1, max_size=5), st.booleans(), st.integers(0, 12))
def test_best_is_the_first_of_the_best_and_never_nan(tmp_path_factory, values, smaller, at):
    folder = tmp_path_factory.mktemp('best')
    def train(*cbs): return train_here(folder, Scripted(values), *cbs, epochs=len(values), n=8, options=dict(monitor='distance', smaller=smaller))
    try: train(Happen(at, 'after_batch', raise_it(ArithmeticError('here'))))
    except ArithmeticError: pass
    train()
    sign = 1 if smaller else -1
    good = [(sign*v, epoch) for epoch,v in enumerate(values) if v == v]
    best = folder/'checkpoints'/'best.safetensors'
    assert best.exists() == bool(good)
    if good: assert read_checkpoint(best)['place']['epoch'] - 1 == min(good)[1]
    shutil.rmtree(folder)

@pytest.mark.parametrize('values,at', [([3., 2., 1.], 5), ([1., 2., 3.], 2)])
def test_best_of_all_evaluations(tmp_path, values, at):
    "Also the one at the end"
    left,learn = list(values),noisy_learner(tmp_path, n=20)
    class Scripts(Callback):
        order = 51
        def after_validate(self): self.recorder.log[-1] = left.pop(0)
    learn.fit_schedule(1, 1e-3, 'flat', cbs=[evaluations := EvalEvery(iters=2), Scripts(), Checkpoint(monitor='distance', smaller=True)])
    assert [(r['iteration'], r['distance']) for r in evaluations.rows] == list(zip([2, 4, 5], values))
    assert read_checkpoint(tmp_path/'checkpoints'/'best.safetensors')['place']['train_iter'] == at

def test_parts_of_the_loss_are_to_be_small(tmp_path):
    learn = noisy_learner(tmp_path)
    learn.loss_func.parts = dict(push_s0=torch.zeros(()))
    for monitor,smaller in dict(push_s0=True, valid_loss=True, AP=False).items():
        checkpoint = Checkpoint(monitor=monitor)
        checkpoint.learn = learn
        assert checkpoint._smaller() == smaller

@pytest.mark.parametrize('keep', [0, -1])
def test_at_least_one_stays(keep):
    with pytest.raises(ValueError, match=f'keep={keep}: at least 1 checkpoint must stay'): Checkpoint(keep=keep)

def test_how_many_stay(tmp_path):
    for keep,names in ((2, [13, 14]), (1, [14]), (None, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14])):
        train_here(tmp_path/str(keep), iters=1, options=dict(keep=keep))
        assert [int(p.stem[-7:]) for p in list_checkpoints(tmp_path/str(keep)/'checkpoints')] == names
        assert len(list((tmp_path/str(keep)/'checkpoints').iterdir())) == len(names)
    train_here(tmp_path/'few', iters=None, options=dict(epochs=None))
    assert [p.stem for p in list_checkpoints(tmp_path/'few'/'checkpoints')] == ['checkpoint_0000014']

def test_what_a_checkpoint_says(tmp_path):
    train_here(tmp_path, options=dict(config=dict(lr=.1)))
    state = read_checkpoint(tmp_path/'checkpoints')
    assert set(state) == set('model loss opt scaler callbacks recorder metrics place config skeleton versions git ranks'.split())
    assert state['config'] == dict(lr=.1) and state['versions']['torch'] == torch.__version__ and state['place']['n_epoch'] == 2

# ---------------------------------------------------------------- what does not fit

def test_a_folder_is_of_one_run(tmp_path):
    train_here(tmp_path)
    with pytest.raises(FileExistsError, match='of another run, up to checkpoint_0000014'): noisy_learner(tmp_path).fit(1, cbs=Checkpoint(tmp_path/'checkpoints'))
    with pytest.raises(FileExistsError, match='iterations to come'):
        shutil.copy(tmp_path/'checkpoints'/'checkpoint_0000007.safetensors', tmp_path/'early.safetensors')
        noisy_learner(tmp_path).resume(tmp_path/'early.safetensors').fit(2, cbs=Checkpoint(tmp_path/'checkpoints'))
    with pytest.raises(ValueError, match="monitor='AP': the Recorder has train_loss, valid_loss"): noisy_learner(tmp_path).fit(1, cbs=Checkpoint(tmp_path/'new', monitor='AP'))

def test_monitor_of_evaluations(tmp_path):
    with pytest.raises(ValueError, match="monitor='train_loss': each evaluation has valid_loss, distance"):
        noisy_learner(tmp_path).fit(1, cbs=[EvalEvery(iters=2), Checkpoint(monitor='train_loss')])

def test_damaged_latest_one(tmp_path, whole, capsys):
    with pytest.raises(ArithmeticError): train_here(tmp_path, Happen(11, 'after_loss', raise_it(ArithmeticError('here'))))
    latest = latest_checkpoint(folder := tmp_path/'checkpoints')
    assert latest.stem == 'checkpoint_0000011'
    latest.write_bytes(latest.read_bytes()[:1000])
    with pytest.raises(ValueError, match='checkpoint_0000011.* is damaged, .*Remove it to go on from an older one'): noisy_learner(tmp_path).resume(latest)
    assert_same(whole, result(train_here(tmp_path, options=dict(keep=1))))
    assert 'checkpoint_0000011.safetensors (1000 bytes) is damaged' in capsys.readouterr().out
    assert sorted(p.name for p in folder.iterdir()) == ['checkpoint_0000011.damaged', 'checkpoint_0000014.safetensors']
    for p in list_checkpoints(folder): p.write_bytes(b'')
    with pytest.raises(ValueError, match='is damaged'): train_here(tmp_path)

def test_another_training(tmp_path):
    with pytest.raises(ArithmeticError): train_here(tmp_path, Happen(9, 'after_loss', raise_it(ArithmeticError('here'))))
    for text,kwargs in {'the optimiser is Optimizer|the optimiser is SGD':dict(opt_func=partial(OptimWrapper, opt=torch.optim.SGD)), '7 batches, and now there are 10':dict(n=40)}.items():
        with pytest.raises(ValueError, match=text): train_here(tmp_path, **kwargs)
    learn = noisy_learner(tmp_path, n=40)
    learn.model[5] = nn.Linear(512, 2)
    with pytest.raises(ValueError, match='does not fit this training'): learn.resume(tmp_path/'checkpoints').fit(2)
    state = read_checkpoint(tmp_path/'checkpoints')
    with pytest.raises(ValueError, match='written by 2 processes, and now there are 1'): noisy_learner(tmp_path).resume(dict(state, ranks=state['ranks']*2)).fit(2)
    for kwargs in (dict(n=40), {}):
        learn = noisy_learner(tmp_path, **kwargs).resume(dict(state, ranks=state['ranks']*(1 if kwargs else 2)), exact=False)
        learn.fit(2)
        assert learn.train_iter == 9 + len(learn.dls.train) and len(learn.recorder.values) == 2

def test_finished_training_stays_as_it_is(tmp_path, whole):
    train_here(tmp_path)
    assert_same(whole, result(train_here(tmp_path)))

def test_a_callback_that_is_missing(tmp_path):
    train_here(tmp_path, EMA())
    with pytest.warns(UserWarning, match='callback ema, which this training is without'): train_here(tmp_path)

# ---------------------------------------------------------------- weights from anywhere

def small_pose(n_joints=17, seed=0):
    torch.manual_seed(seed)
    return HigherHRNet(n_joints, width=4, stem=4, layer1_block='basic', layer1_width=4, layer1_blocks=1, modules=(1,1,1), blocks=1, deconv_blocks=1, init='kaiming')

names = list(small_pose().state_dict())
in_backbone = lambda k: k.split('.')[0] in backbone_layers

@settings(max_examples=40, deadline=None)
@given(st.sampled_from(['module.', 'model.net.', 'state.model.', 'x1.', 'conv1.', 'stage2.0.']), st.floats(0, .3), st.booleans(), st.integers(0, 99))
def test_any_common_prefix(prefix, dropped, turned, seed):
    "Some names are missing on either side; the file has the prefix, or the model"
    rng = random.Random(seed)
    left,right = ([n for n in names if rng.random() >= dropped] for _ in range(2))
    if turned: assert match_names([prefix+n for n in left], right) == {prefix+n: n for n in left if n in right}
    else: assert match_names(left, [prefix+n for n in right]) == {n: prefix+n for n in left if n in right}

def test_student_and_teacher():
    "One has a tensor more: still nobody knows which one is meant"
    for missing in (0, 1, 5):
        with pytest.raises(ValueError, match='more than one match'): match_names(names, [f'student.{n}' for n in names] + [f'teacher.{n}' for n in names[missing:]])

def test_two_parts():
    found = {n: f'{"body" if in_backbone(n) else "top"}.{n}' for n in names}
    assert match_names(names, found.values()) == found

def test_ambiguity_is_an_error():
    for found in (['a.conv.weight', 'b.conv.weight'], ['a.x.conv.weight', 'b.y.conv.weight', 'c.fc.bias']):
        with pytest.raises(ValueError, match='more than one match'): match_names(['conv.weight', 'fc.weight'], found)
    assert match_names(['bn1.weight'], ['xbn1.weight', 'other.weight']) == {}

def test_files_that_people_have(tmp_path):
    source = small_pose(seed=1).state_dict()
    imagenet = {**{k: v for k,v in source.items() if in_backbone(k)}, 'incre_modules.0.0.conv1.weight':torch.ones(4, 4, 1, 1), 'downsamp_modules.0.0.bias':torch.ones(4),
                'final_layer.0.weight':torch.ones(8, 4, 1, 1), 'final_layer.0.bias':torch.ones(8), 'classifier.weight':torch.ones(10, 8), 'classifier.bias':torch.ones(10)}
    torch.save(imagenet, tmp_path/'imagenet.pth')
    report = load_matching(net := small_pose(), tmp_path/'imagenet.pth')
    assert set(report.matched) == set(filter(in_backbone, names)) and len(report.unused) == 6 and not report.misshapen
    assert set(report.missing) == {k for k in names if not in_backbone(k)}
    for k,v in net.state_dict().items(): assert torch.equal(v, source[k]) == (in_backbone(k) or torch.equal(small_pose().state_dict()[k], source[k])), k
    for head,file in (('keypoint_head', 'mm0.pth'), ('head', 'mm1.pth')):
        torch.save(dict(meta={}, state_dict={f'{"backbone" if in_backbone(k) else head}.{k}': v for k,v in source.items()}), tmp_path/file)
    torch.save({f'1.{k}': v for k,v in source.items()}, tmp_path/'original.pth.tar')
    for file in ('mm0.pth', 'mm1.pth', 'original.pth.tar'):
        report = load_matching(net := small_pose(), tmp_path/file)
        assert len(report.matched) == len(names) and not (report.missing or report.unused or report.misshapen)
        for k,v in net.state_dict().items(): assert torch.equal(v, source[k]), k

def test_another_number_of_joints():
    source = small_pose(seed=1).state_dict()
    report = load_matching(net := small_pose(14), source)
    heads = {'final_layers.0.weight', 'final_layers.0.bias', 'final_layers.1.weight', 'final_layers.1.bias', 'deconv_layers.0.0.0.weight'}
    assert set(report.misshapen) == heads and report.misshapen['final_layers.0.bias'] == ((28,), (34,)) and set(report.matched) == set(names) - heads
    for k,v in net.state_dict().items(): assert k in heads or torch.equal(v, source[k])
    for text in ('5 misshapen', 'final_layers.0.bias (34,) for (28,)', '0 unused', f'{len(names)-5} matched'): assert text in repr(report)

def test_blue_first():
    source = small_pose(seed=1).eval()
    load_matching(net := small_pose().eval(), source.state_dict(), bgr=True)
    x = torch.randn(1, 3, 64, 64)
    for a,b in zip(net(x), source(x.flip(1))): torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match='no convolution of 3 channels'): load_matching(nn.Linear(2, 2), nn.Linear(2, 2).state_dict(), bgr=True)
    with pytest.raises(ValueError, match='No tensor of the model is in the weights'): load_matching(nn.ModuleDict(dict(other=nn.Linear(2, 2))), source.state_dict())

def test_checkpoint_of_a_compiled_module(tmp_path):
    learn = noisy_learner(tmp_path)
    learn.model = torch.compile(learn.model, backend='eager')
    learn.fit_schedule(1, 1e-2, 'flat', cbs=[EMA(.1), Checkpoint()])
    report = load_matching(net := small_net(), tmp_path/'checkpoints')
    assert not report.missing and not report.unused
    for k,v in net.state_dict().items(): assert torch.equal(v, learn.model._orig_mod.state_dict()[k]), k        # the average
    assert any(not torch.equal(v, net.state_dict()[k]) for k,v in checkpoint_weights(tmp_path/'checkpoints', average=False).items())

def test_checkpoints_are_weights(tmp_path):
    learn = train_here(tmp_path, EMA(.1))
    for path in (tmp_path/'checkpoints', latest_checkpoint(tmp_path/'checkpoints')):
        report = load_matching(net := small_net(), path)
        assert not report.missing and not report.unused
        for a,b in zip(net.state_dict().values(), learn.model.state_dict().values()): assert torch.equal(a, b)
