"""Several processes: real ones under every launcher, with the numbers of a single one; and what happens when one of them dies"""
import inspect, json, multiprocessing, os, re, signal, socket, subprocess, sys, time
from pathlib import Path
from types import SimpleNamespace
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from posenb.distributed import (Heartbeat, RankDL, _check_accelerator, _check_launch, distributed, rank_part, setup_rank)

torch.set_num_threads(1)
here,bin = Path(__file__).parent,Path(sys.executable).parent

def free_port():
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); return s.getsockname()[1]

# ---------------------------------------------------------------- the parts of an epoch

@settings(max_examples=150, deadline=None)
@given(n=st.integers(0, 70), bs=st.integers(1, 6), world=st.integers(1, 5), drop_last=st.booleans(), pad=st.booleans())
def test_parts(n, bs, world, drop_last, pad):
    order = np.random.default_rng(n).permutation(n).tolist()
    parts = [rank_part(order, bs, r, world, drop_last, pad) for r in range(world)]
    step = bs*world
    for k in range(n//step):                                            # common batches are those of one process
        assert sum((p[k*bs:(k+1)*bs] for p in parts), []) == order[k*step:(k+1)*step]
    sizes = [len(p) for p in parts]
    if drop_last: assert sizes == [n//step*bs]*world
    elif pad: assert len(set(sizes)) == 1 and sizes[0] - n/world < 1 and set(sum(parts, [])) == set(order)
    else: assert max(sizes) - min(sizes) <= 1 and sorted(sum(parts, [])) == sorted(order)

@settings(max_examples=50, deadline=None)
@given(n=st.integers(1, 50), bs=st.integers(1, 5), world=st.integers(1, 4), drop_last=st.booleans(), pad=st.booleans())
def test_length(n, bs, world, drop_last, pad):
    from fastai.data.load import DataLoader
    class Played(RankDL):
        def _broadcast(self, indices, rank): return indices
    loaders = [Played(DataLoader(list(range(n)), bs=bs, drop_last=drop_last), pad, r, world) for r in range(world)]
    steps = [len(list(dl)) for dl in loaders]
    assert max(steps) == len(loaders[0])
    if pad or drop_last: assert set(steps) == {len(loaders[0])}

def test_pose_batches(synth):
    "Batches of people, with workers: the two parts of a common batch are the batch of one process"
    from posenb.learner import pose_dls
    class Played(RankDL):
        def _broadcast(self, indices, rank): return indices
    def loader(bs): return pose_dls(synth, size=64, bs=bs, workers=1, flip=.5).train
    one,parts = loader(4),[Played(loader(2), True, r, 2) for r in range(2)]
    for epoch in range(2):
        for (images,maps,*_),*pairs in zip(one, *map(list, parts)):
            assert torch.equal(images, torch.cat([p[0] for p in pairs])) and torch.equal(maps[1], torch.cat([p[1][1] for p in pairs]))
    assert parts[0].epoch == parts[1].epoch == one.epoch == 2

# ---------------------------------------------------------------- what is caught before it starts

def test_promises():
    accelerator = SimpleNamespace(num_processes=1, mixed_precision='no')
    with pytest.raises(RuntimeError, match='promised 0 processes, accelerate found 1'): _check_accelerator(accelerator)
    accelerator = SimpleNamespace(num_processes=0, mixed_precision='bf16')
    with pytest.raises(ValueError, match='--mixed_precision no'): _check_accelerator(accelerator)

def test_no_gpu_left(monkeypatch):
    monkeypatch.setenv('WORLD_SIZE', '3'); monkeypatch.setenv('LOCAL_RANK', '2'); monkeypatch.delenv('ACCELERATE_USE_CPU', raising=False)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True); monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    with pytest.raises(RuntimeError, match='process 3 of this machine has no GPU: there are 2'): setup_rank()

def test_silence_is_noticed_within_a_minute():
    defaults = {k: p.default for k,p in inspect.signature(Heartbeat).parameters.items()}
    assert inspect.signature(distributed).parameters['silence'].default == defaults['silence']
    assert defaults['silence'] + defaults['grace'] + 2*2 < 60

# ---------------------------------------------------------------- the job

JOB = '''
import json, os, random, signal, sys, time
import torch
from pathlib import Path
from torch import nn
from torch.utils.data import TensorDataset
from fastai.callback.core import Callback
from fastai.callback.progress import ProgressCallback
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from fastai.optimizer import SGD
from posenb.distributed import distributed, gather_results, on_rank0, ranks, setup_rank, share, sum_over_ranks

class EpochDL(DataLoader):
    epoch,n_inp = 0,1
    def randomize(self): self.rng = random.Random(f'7 {self.epoch}')
    def after_iter(self): self.epoch += 1

class Net(nn.Module):
    def __init__(self, norm, unused=False):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), norm, nn.ReLU(), nn.Conv2d(6, 1, 3, padding=1))
        if unused: self.unused = nn.Linear(2, 2)
    def forward(self, x): return self.body(x)

class Loss(nn.MSELoss):
    def forward(self, pred, y, i): return super().forward(pred, y)

def images(n, seed):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 1, 8, 8, generator=g), torch.rand(n, 1, 8, 8, generator=g), torch.arange(n)

class Frozen(Callback):
    def before_train(self): self.model.apply(lambda m: m.eval() if isinstance(m, nn.BatchNorm2d) else None)

class Steps(Callback):
    "Loss and images of every training step"
    def __init__(self): self.log = []
    def after_loss(self):
        if not self.training: return
        seen = gather_results({ranks()[0]: self.seen.tolist()})
        self.log.append(((sum_over_ranks(self.loss)/ranks()[1]).item(), sum(seen.values(), [])))
    def before_batch(self): self.seen = self.yb[1]

def learner(norm, bs, n=50, workers=0, drop_last=True, n_valid=21, **kwargs):
    torch.manual_seed(3*ranks()[0])
    loaders = (EpochDL(TensorDataset(*images(n, 1)), bs=bs, shuffle=True, drop_last=drop_last, num_workers=workers),
               DataLoader(TensorDataset(*images(n_valid, 2)), bs=bs))
    dls = DataLoaders(*loaders, device=setup_rank())
    dls.n_inp = 1
    return Learner(dls, Net(norm, **kwargs), Loss(), opt_func=SGD, lr=.05, metrics=lambda p,y,i: (p - y).abs().mean())

def trained(norm, bs, epochs=2, cbs=(), fit=True, quiet=True, seed=None, ddp={}, **kwargs):
    learn = learner(norm, bs, **kwargs)
    if quiet: learn.remove_cb(ProgressCallback)
    logger = learn.logger
    with distributed(learn, seed=seed, **ddp):
        if quiet: learn.logger = lambda row: None
        learn.fit(epochs, cbs=[steps := Steps(), *cbs])
        stats = sum((b.sum().item() for b in learn.model.buffers()), 0.)
        weights = gather_results({ranks()[0]: [stats, *(p.sum().item() for p in learn.model.parameters())]})
        draws = gather_results({ranks()[0]: torch.rand(1).item()})
    restored = type(learn.model) is Net and type(learn.dls.train) is EpochDL and hasattr(learn, 'progress') != quiet
    return dict(losses=[l for l,_ in steps.log], images=[i for _,i in steps.log], rows=[list(map(float, r)) for r in learn.recorder.values],
                weights=list(weights.values()), draws=list(draws.values()), restored=gather_results({ranks()[0]: restored}))

def fails(x): raise ValueError('only rank 0 knows')

def everything(bs):
    setup_rank()
    met = [ranks()[1], len(set(gather_results({ranks()[0]: on_rank0(os.getpid)}).values()))]        # before there is a learner
    out = dict(met=met, group=trained(nn.GroupNorm(2, 6), bs), workers=trained(nn.GroupNorm(2, 6), bs, workers=2, epochs=1),
               frozen=trained(nn.BatchNorm2d(6), bs, cbs=[Frozen()]), batch=trained(nn.BatchNorm2d(6), bs, seed=5),
               unused=trained(nn.GroupNorm(2, 6), bs, epochs=1, unused=True, ddp=dict(find_unused_parameters=True)),
               ragged=trained(nn.GroupNorm(2, 6), bs, epochs=1, n=53, drop_last=False),
               few=trained(nn.GroupNorm(2, 6), bs, epochs=1, n_valid=1),
               bar=trained(nn.GroupNorm(2, 6), bs, epochs=1, quiet=False))
    from accelerate.utils import DDPCommunicationHookType
    out['fp16'] = trained(nn.GroupNorm(2, 6), bs, epochs=1, ddp=dict(comm_hook=DDPCommunicationHookType.FP16))
    if setup_rank().type == 'cuda': out['sync'] = trained(nn.BatchNorm2d(6), bs, ddp=dict(sync_bn=True))
    learn = learner(nn.GroupNorm(2, 6), bs)
    with distributed(learn):
        out['validate'] = list(map(float, learn.validate()))
        out['shared'] = gather_results({i: ranks()[0] for i in share(range(9))})
        out['doubled'] = gather_results({1: ranks()[0], 4-ranks()[0]: 'x'})
        try: on_rank0(fails, 1)
        except ValueError as e: out['error'] = list(gather_results({ranks()[0]: f'{e} {getattr(e, "on_all_ranks", ranks()[1] == 1)}'}).values())
        if ranks()[1] > 1 and setup_rank().type == 'cpu':
            try:
                with distributed(learn, sync_bn=True): pass
            except ValueError as e: out['sync_bn'] = str(e)
    return out

class Stop(Callback):
    "In the last rank, something happens at the third step"
    def __init__(self, how): self.how = how
    def after_batch(self):
        if ranks()[0] != ranks()[1]-1 or self.train_iter != 3: return
        print('now', time.time(), file=sys.stderr, flush=True)
        if self.how == 'error': raise ValueError('a bad image')
        os.kill(os.getpid(), dict(kill=signal.SIGKILL, freeze=signal.SIGSTOP, term=signal.SIGTERM)[self.how])

def ends(how, silence=30., epochs=10000):
    setup_rank()
    learn = learner(nn.GroupNorm(2, 6), 8)
    learn.remove_cb(ProgressCallback); learn.logger = lambda row: None
    with distributed(learn, silence=silence): learn.fit(epochs, cbs=[Steps(), Stop(how)])

def main(what, file):
    torch.set_num_threads(1)
    if what != 'everything': return ends(what)
    out = everything(16//int(os.environ['WORLD_SIZE']))
    if int(os.environ['RANK']) == 0: Path(file).write_text(json.dumps(out))

if __name__ == '__main__': main(*sys.argv[1:])
'''

@pytest.fixture(scope='module')
def job(tmp_path_factory):
    path = tmp_path_factory.mktemp('job')/'job.py'
    path.write_text(JOB)
    sys.path.insert(0, str(path.parent))
    yield path
    sys.path.remove(str(path.parent))

@pytest.fixture(scope='module')
def single(job):
    import job as module
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('ACCELERATE_USE_CPU', 'true')
        return json.loads(json.dumps(module.everything(16)))

launchers = dict(
    accelerate=lambda: [bin/'accelerate', 'launch', '--multi_gpu', '--num_processes', 2, '--num_machines', 1, '--mixed_precision', 'no',
                        '--dynamo_backend', 'no', '--main_process_port', free_port()],
    torchrun=lambda: [bin/'torchrun', '--standalone', '--nproc_per_node', 2])

def environment(cpu='true'): return {**os.environ, 'ACCELERATE_USE_CPU': cpu, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(here.parent), 'PYTHONWARNINGS': 'ignore'}

def launch(launcher, *args):
    return subprocess.run([*map(str, launchers[launcher]()), *map(str, args)], env=environment(), capture_output=True, text=True, timeout=300)

# ---------------------------------------------------------------- two processes, one result

def check_everything(one, two, tolerance=1e-5):
    for case in ('group', 'workers', 'frozen', 'unused', 'few'):                          # few: one rank has nothing to validate
        a,b = one[case],two[case]
        assert a['images'] == b['images'], case                                       # the same common batches
        np.testing.assert_allclose(b['losses'], a['losses'], rtol=0, atol=tolerance, err_msg=case)
        np.testing.assert_allclose(b['rows'], a['rows'], rtol=0, atol=tolerance, err_msg=case)   # smoothed, validation and metric: 21 images on two ranks
    exact,rounded = one['fp16']['losses'],two['fp16']['losses']                           # gradients travel as float16
    np.testing.assert_allclose(rounded, exact, rtol=0, atol=1e-3)
    without = two['group']['losses'][:len(rounded)]
    assert np.abs(np.subtract(rounded, without)).max() > 3*np.abs(np.subtract(exact, without)).max()
    np.testing.assert_allclose(two["validate"], one["validate"], rtol=0, atol=tolerance)
    first,second = two['group']['images'][:3],two['group']['images'][3:]
    assert all(len(set(sum(e, []))) == 48 for e in (first, second)) and first != second     # every epoch another order, nothing twice
    for case in ('group', 'frozen', 'batch', 'unused', 'ragged'):
        assert two[case]['weights'][0] == two[case]['weights'][1], case
        assert two[case]['restored'] == {'0': True, '1': True}, case
    assert two['bar']['restored'] == {'0': True, '1': True}
    assert len(set(two['batch']['draws'])) == 2
    ragged = two['ragged']['images']
    assert [len(i) for i in ragged] == [16, 16, 16, 6] and set(sum(ragged, [])) == set(range(53))
    assert two['shared'] == {str(i): i % 2 for i in range(9)}
    assert one['met'] == [1, 1] and two['met'] == [2, 1]
    assert two['doubled'] == {'1': 0, '3': 'x', '4': 'x'}
    assert two['error'] == ['only rank 0 knows True']*2

@pytest.mark.parametrize('launcher', launchers)
def test_two_processes(launcher, job, single, tmp_path):
    done = launch(launcher, job, 'everything', tmp_path/'out.json')
    assert done.returncode == 0, done.stderr
    check_everything(single, two := json.loads((tmp_path/'out.json').read_text()))
    assert 'GPUs only' in two['sync_bn']
    assert len(re.findall('train_loss', done.stdout)) == 1, done.stdout               # one table, rank 0's

SHARED = '''
import os
os.environ['LOCAL_RANK'] = '0'
import torch
from accelerate import PartialState
if os.environ['WORLD_SIZE'] == '2':
    torch.cuda.set_device(0)
    PartialState(backend='gloo')
'''

@pytest.mark.gpu
def test_two_processes_share_a_gpu(tmp_path):
    "Over gloo, as NCCL wants a GPU for each rank; batch normalisation over both"
    (tmp_path/'job.py').write_text(SHARED + JOB)
    for n in (1, 2):
        command = map(str, [bin/'torchrun', '--standalone', '--nproc_per_node', n, tmp_path/'job.py', 'everything', tmp_path/f'{n}.json'])
        done = subprocess.run(list(command), env=environment(cpu='false'), capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
    one,two = (json.loads((tmp_path/f'{n}.json').read_text()) for n in (1, 2))
    check_everything(one, two)
    np.testing.assert_allclose(two['sync']['losses'], one['sync']['losses'], rtol=0, atol=1e-5)

@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason='needs two GPUs')
def test_two_gpus(job, tmp_path):
    "NCCL, and batch normalisation over both ranks"
    for n in (1, 2):
        command = map(str, [bin/'torchrun', '--standalone', '--nproc_per_node', n, job, 'everything', tmp_path/f'{n}.json'])
        done = subprocess.run(list(command), env=environment(cpu='false'), capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
    one,two = (json.loads((tmp_path/f'{n}.json').read_text()) for n in (1, 2))
    check_everything(one, two, 1e-4)
    np.testing.assert_allclose(two['sync']['losses'], one['sync']['losses'], rtol=0, atol=1e-4)

def test_notebook(job, single, tmp_path):
    "`notebook_launcher` in a kernel, with everything defined in the notebook"
    nbformat,nbclient = pytest.importorskip('nbformat'),pytest.importorskip('nbclient')
    code = JOB.replace("if __name__ == '__main__': main(*sys.argv[1:])", '')
    call = f"from accelerate import notebook_launcher\nnotebook_launcher(main, ('everything', r'{tmp_path/'out.json'}'), num_processes=2, use_port='{free_port()}')"
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in (code, call)])
    old = {k: os.environ.get(k) for k in environment()}
    os.environ.update(environment())
    try: nb = nbclient.NotebookClient(nb, timeout=300, kernel_name='python3').execute()
    finally:
        for k,v in old.items(): os.environ.pop(k) if v is None else os.environ.__setitem__(k, v)
    check_everything(single, json.loads((tmp_path/'out.json').read_text()))
    printed = ''.join(o.text for o in nb.cells[1].outputs if o.output_type == 'stream' and o.name == 'stdout')
    assert len(re.findall(r"^\[0, ", printed, re.M)) == 1, printed                    # a row of the one case that shows its progress, of rank 0

def test_one_process_where_two_were_asked_for(tmp_path):
    (tmp_path/'env.py').write_text('import json, os; print("ENV" + json.dumps(dict(os.environ)))')
    env = {k: v for k,v in environment().items() if k != 'ACCELERATE_USE_CPU'}
    done = subprocess.run([bin/'accelerate', 'launch', '--cpu', '--num_processes', '2', tmp_path/'env.py'], env=env, capture_output=True, text=True, timeout=300)
    environments = [json.loads(line[3:]) for line in done.stdout.splitlines() if line.startswith('ENV')]
    assert len(environments) == 1, done
    with pytest.raises(RuntimeError, match='started one'): _check_launch(environments[0])

# ---------------------------------------------------------------- ends

def test_killed(job):
    "A rank is killed: the launcher and the other rank are gone soon, with an error"
    done = launch('torchrun', job, 'kill', '-')
    took = time.time() - float(re.search(r'now ([\d.]+)', done.stderr)[1])
    print(f'{took:.1f} s from the kill to the end of the launcher')
    assert done.returncode and took < 60
    assert re.search(r'rank *: 1', done.stderr) and 'SIGKILL' in done.stderr, done.stderr

def without_launcher(job, how, tmp_path, **kwargs):
    "Two processes that nobody watches; returns exit code, error output and seconds after the event, for rank 0"
    port,processes = free_port(),[]
    def run(rank):
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE='2', MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port), ACCELERATE_USE_CPU='true')
        with open(tmp_path/f'{rank}', 'w') as f: os.dup2(f.fileno(), 2); sys.stderr = os.fdopen(2, 'w')
        torch.set_num_threads(1)
        import job as module
        try: module.ends(how, **kwargs)
        except BaseException: import traceback; traceback.print_exc(); sys.stderr.flush(); os._exit(3)
        os._exit(0)
    for rank in range(2):
        processes.append(multiprocessing.get_context('fork').Process(target=run, args=(rank,)))
        processes[-1].start()
    processes[0].join(240)
    ended = time.time()
    if processes[1].is_alive(): os.kill(processes[1].pid, signal.SIGKILL)
    processes[1].join()
    errors = [(tmp_path/str(r)).read_text() for r in range(2)]
    if processes[0].is_alive(): processes[0].kill(); pytest.fail('rank 0 waits for ever\n' + '\n'.join(errors))
    return processes[0].exitcode,errors[0],ended - float(re.search(r'now ([\d.]+)', errors[1])[1])

def test_killed_far_away(job, tmp_path):
    code,error,took = without_launcher(job, 'kill', tmp_path)
    assert code and took < 30 and 'rank 0 of 2 ends: rank 0 failed with RuntimeError' in error, error

def test_error(job, tmp_path):
    code,error,took = without_launcher(job, 'error', tmp_path)
    assert code and took < 30 and re.search('rank 0 of 2 ends: rank 1 failed with ValueError: .*a bad image', error), error

def test_hanging(job, tmp_path, monkeypatch):
    "No sign of life: the process that waits is ended"
    monkeypatch.setattr(Heartbeat.__init__, '__defaults__', (5., 1.))        # silence, grace
    code,error,took = without_launcher(job, 'freeze', tmp_path, silence=5.)
    print(f'{took:.1f} s')
    assert code == 1 and 5 < took < 30 and 'rank 0 of 2 ends: rank 1 was not heard of for 5 seconds' in error, error

def test_a_rank_names_the_images_of_its_batch(synth, monkeypatch):
    "What `CheckFinite` says about a batch must be about this rank's images"
    from posenb.learner import pose_dls
    monkeypatch.setattr(RankDL, '_broadcast', lambda self, t, rank: t)          # ranks are played one after the other
    train = pose_dls(synth, size=64, bs=4, workers=0, device='cpu').train
    named = []
    for rank in range(2):
        train.epoch,dl = 0,RankDL(train, rank=rank, world_size=2)
        for _ in dl:
            names = dl.last_names()
            assert len(names) == 4
            named += names
    assert len(named) == len(set(named))          # no image on two ranks
