"""What the training engine costs: milliseconds of the processor per iteration of a tiny model, beside a bare PyTorch loop

    python tests/bench_engine.py [iterations] [runs]

The exit status is 1 if all callbacks together cost more than `bar` milliseconds.
"""
import io, sys, tempfile, time, warnings
warnings.filterwarnings('ignore', category=FutureWarning)
from contextlib import redirect_stdout
from statistics import median
import torch
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from posenb.callbacks import Accumulate, CheckFinite, ChannelsLast, ClipGrad, EMA, EvalEvery, FreezeBN, FreezeLayers, PreciseBN, Precision, WarnUnused
from posenb.checkpoint import Checkpoint
from posenb.learner import adam
from posenb.log import CSVFile, DeviceSmoothLoss, EventLog, JSONLines
from posenb.schedule import Schedule          # and `fit_schedule`

bar,bs = 3.,8
def model(): return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
def data(n): return TensorDataset(torch.randn(n*bs, 3, 16, 16), torch.randint(0, 4, (n*bs,)))

def bare(data):
    net,loss_func = model(),nn.CrossEntropyLoss()
    opt = torch.optim.AdamW(net.parameters(), fused=True)
    start = time.process_time()
    for x,y in DataLoader(data, bs, shuffle=True):
        loss = loss_func(net(x), y)
        loss.backward()
        opt.step()
        opt.zero_grad()
    return time.process_time() - start

def engine(data, cbs):
    with tempfile.TemporaryDirectory() as folder:
        dls = DataLoaders(DataLoader(data, bs, shuffle=True), DataLoader(TensorDataset(*data[:bs]), bs), device='cpu')
        learn = Learner(dls, model(), loss_func=nn.CrossEntropyLoss(), opt_func=adam, path=folder, cbs=cbs)
        if cbs: learn.recorder.smooth_loss = DeviceSmoothLoss()
        with learn.no_bar(), learn.no_logging(), redirect_stdout(io.StringIO()):       # the log's word on the loader
            start = time.process_time()
            learn.fit_schedule(1, 1e-3, sched='cosine', warmup=.1)
            return time.process_time() - start

def every():
    "All that can be on together; `EvalEvery` is asked at each iteration and never due, `PreciseBN` works before the validation at the end"
    return [EventLog(writers=[JSONLines(), CSVFile()]), Checkpoint(epochs=1), CheckFinite(), EMA(), Accumulate(1), ClipGrad(1., value=1., each_norm=1.),
            EvalEvery(iters=10**6), PreciseBN(10), FreezeBN('^1'), FreezeLayers('^0', until=10), ChannelsLast(), Precision('bf16'), WarnUnused()]

def measure(n, runs):
    "Milliseconds per iteration of each loop, in the median of `runs` of `n` iterations"
    examples = data(n)
    loops = {'bare loop': lambda: bare(examples), 'fastai': lambda: engine(examples, []), 'all callbacks': lambda: engine(examples, every())}
    times = {name: [] for name in loops}
    for _ in range(runs):
        for name,f in loops.items(): times[name].append(f()/n*1e3)
    return {name: median(ts) for name,ts in times.items()}

def main(n=400, runs=7):
    torch.set_num_threads(1)
    ms = measure(n, runs)
    cost = {name: t - ms['bare loop'] for name,t in ms.items()}
    for name,t in ms.items(): print(f'{name:14} {t:6.2f} ms per iteration, {cost[name]:5.2f} more than the bare loop (median of {runs} runs of {n})')
    if cost['all callbacks'] > bar: return f'all callbacks cost {cost["all callbacks"]:.2f} ms per iteration, and {bar:g} are allowed'

if __name__ == '__main__': sys.exit(main(*map(int, sys.argv[1:])))
