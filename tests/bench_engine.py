"""What the training engine costs: milliseconds per iteration of a tiny model, beside a bare PyTorch loop

    python tests/bench_engine.py
"""
import tempfile, time
from statistics import median
import torch
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from posenb.callbacks import CheckFinite, ChannelsLast, ClipGrad, EMA, Precision, WarnUnused
from posenb.checkpoint import Checkpoint
from posenb.learner import adam
from posenb.log import CSVFile, EventLog, JSONLines
from posenb.schedule import Schedule          # and `fit_schedule`

n,bs = 400,8
torch.set_num_threads(1)
data = TensorDataset(torch.randn(n*bs, 3, 16, 16), torch.randint(0, 4, (n*bs,)))
def model(): return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
def loader(): return DataLoader(data, bs, shuffle=True)

def bare():
    net,loss_func = model(),nn.CrossEntropyLoss()
    opt = torch.optim.AdamW(net.parameters(), fused=True)
    start = time.perf_counter()
    for x,y in loader():
        loss = loss_func(net(x), y)
        loss.backward()
        opt.step()
        opt.zero_grad()
    return time.perf_counter() - start

def engine(cbs):
    with tempfile.TemporaryDirectory() as folder:
        learn = Learner(DataLoaders(loader(), DataLoader(TensorDataset(*data[:bs]), bs), device='cpu'), model(), loss_func=nn.CrossEntropyLoss(), opt_func=adam, path=folder, cbs=cbs())
        with learn.no_bar(), learn.no_logging():
            start = time.perf_counter()
            learn.fit_schedule(1, 1e-3, sched='cosine', warmup=.1)
            return time.perf_counter() - start

def every(): return [EventLog(writers=[JSONLines(), CSVFile()]), Checkpoint(epochs=1), CheckFinite(), EMA(), ClipGrad(1.), ChannelsLast(), Precision('bf16'), WarnUnused()]

if __name__ == '__main__':
    loops = {'bare loop': bare, 'fastai': lambda: engine(list), 'all callbacks': lambda: engine(every)}
    times = {name: [] for name in loops}
    for _ in range(7):
        for name,f in loops.items(): times[name].append(f()/n*1e3)
    for name,ts in times.items(): print(f'{name:14} {median(ts):6.2f} ms per iteration, {median(ts) - median(times["bare loop"]):5.2f} more than the bare loop (median of {len(ts)} runs of {n})')
