"Checkpoints: killed anywhere and gone on from there, a training ends where it would have ended; and nothing that is on the disk is half of something"
import json, multiprocessing, os, pickle, random, resource, shutil, signal, socket, subprocess, sys, time, warnings
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
from posenb.callbacks import EMA, Accumulate, EvalEvery, Precision
from posenb.checkpoint import (Checkpoint, checkpoint_weights, latest_checkpoint, list_checkpoints, load_matching, match_names, read_checkpoint,
                               write_checkpoint)
from posenb.distributed import distributed
from posenb.learner import pose_dls, pose_learner
from posenb.log import EventLog, JSONLines, read_log
from posenb.model import HigherHRNet, backbone_layers, higher_hrnet
from posenb.schedule import *

torch.set_num_threads(1)
here = Path(__file__).parent
slow = pytest.mark.skipif(not os.environ.get('POSENB_SLOW'), reason='takes minutes: POSENB_SLOW=1')

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

def train(kind, folder, workers, epochs, iters, kill, rank, n_ranks, port):
    "A process: trains, or goes on, until it is done or killed"
    warnings.filterwarnings('ignore')
    torch.set_num_threads(1)
    multiprocessing.set_start_method('fork', force=True)
    if n_ranks > 1: os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(n_ranks), MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port), ACCELERATE_USE_CPU='true')
    if n_ranks > 1 and rank == 0: store = torch.distributed.TCPStore('127.0.0.1', port, is_master=True, wait_for_workers=False)
    if n_ranks > 1: os.environ['TORCHELASTIC_USE_AGENT_STORE'] = 'True'
    seed_all()
    learn = dict(noisy=noisy_learner, people=people_learner)[kind](folder, workers)
    cbs = [Checkpoint(folder/'checkpoints', iters=iters, resume=True)] + ([Kill(*kill)] if kill else [])
    with distributed(learn, seed=0, silence=None): learn.fit_schedule(epochs, 5e-3, 'cosine', warmup_iters=4, cbs=cbs)
    if rank == 0: torch.save(result(learn), folder/'result.pt')

context = multiprocessing.get_context('forkserver')
context.set_forkserver_preload(['test_checkpoint'])

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

configs = [(kind, workers, ranks) for kind in ('people', 'noisy') for ranks in (1, 2) for workers in (0, 2)]
n_iter = {('people', 1): 7, ('people', 2): 3, ('noisy', 1): 7, ('noisy', 2): 4}

def random_kills(kind, ranks, n, seed):
    rng = random.Random(seed)
    return [(rng.randrange(1, 2*n_iter[kind, ranks]), rng.choice(events if ranks == 1 else events[:7]), rng.randrange(ranks)) for _ in range(n)]

@pytest.mark.parametrize('kind,workers,ranks', configs)
def test_killed_run_ends_the_same(tmp_path_factory, kind, workers, ranks):
    if kind == 'noisy' and ranks == 2 and workers == 0: pytest.skip('in the long test')
    check_kills(tmp_path_factory, kind, workers, ranks, sorted(random_kills(kind, ranks, 2, f'{kind} {workers} {ranks}')))
