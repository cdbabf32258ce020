"Learning rates equal the closed forms of detectron2 (fvcore), mmcv and FastReID, written down here a second time"
import math
from bisect import bisect_right
from functools import partial
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st, assume
from torch import nn
from fastai.callback.core import Callback
from fastai.callback.progress import ProgressCallback
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from fastai.optimizer import OptimWrapper
from posenb.schedule import (SCHEDULES, Schedule, cosine, exponential, fixed_gamma, flat_cosine, group_lrs, inverse, multistep,
                             plot_schedule, polynomial, scale_lr, schedule, with_ramp, with_warmup)

few = settings(max_examples=60, deadline=None)
epochs,per_epoch = st.integers(2, 12), st.integers(1, 25)
factors,methods = st.floats(1e-4, 1), st.sampled_from(['constant', 'linear', 'exponential'])

def same(got, want): np.testing.assert_allclose(np.array(got, float), np.array(want, float), rtol=1e-9, atol=1e-12)

# ---------------------------------------------------------------- detectron2: multipliers of the place `where` in [0, 1)

def d2_main(kind, total, **o):
    "fvcore's parameter schedulers with start value 1"
    if kind == 'multistep': return lambda w: o['gamma']**bisect_right(o['milestones'], int((w + 1e-6)*total))
    if kind == 'cosine': return lambda w: o['end'] + .5*(1 - o['end'])*(1 + math.cos(math.pi*w))
    if kind == 'fixed': return lambda w: o['gamma']**int((w + 1e-6)*(o['decays'] + 1))
    if kind == 'poly': return lambda w: (1 - w)**o['power']
    if kind == 'exponential': return lambda w: o['decay']**w

def d2_lr(main, i, total, warm, factor, method, rescale=False):
    "WarmupParamScheduler: a ramp of length warm/total, then the main schedule, on its own clock or squeezed into the rest"
    length,where = warm/total, i/total
    if where + 1e-6 > length: return main((where - length)/(1 - length)) if rescale else main(where)
    start,end = factor*main(0.), main(0.) if rescale else main(length)
    return start if method == 'constant' else end*(where/length) + start*(1 - where/length)

@few
@given(epochs, per_epoch, st.data(), factors, st.sampled_from(['constant', 'linear']), st.floats(.05, .9))
def test_detectron2(n_epoch, n_iter, data, factor, method, gamma):
    total = n_epoch*n_iter
    warm = data.draw(st.integers(0, total - 1))
    milestones = sorted(data.draw(st.sets(st.integers(1, total - 1), max_size=4)))
    ours = partial(schedule, n_epoch, n_iter, 2., warmup_iters=warm, factor=factor, method=method, ramp=True)
    cases = [(d2_main('multistep', total, milestones=milestones, gamma=gamma),
              ours(sched='multistep', steps=[m/n_iter for m in milestones], gamma=gamma)),
             (d2_main('cosine', total, end=.1), ours(sched='cosine', end=.1)),
             (d2_main('fixed', total, decays=3, gamma=gamma), ours(sched='fixed_gamma', decays=3, gamma=gamma)),
             (d2_main('poly', total, power=.9), ours(sched='polynomial', power=.9)),
             (d2_main('exponential', total, decay=.02), ours(sched='exponential', gamma=.02**(1/n_epoch)))]
    for main,f in cases: same([f(i) for i in range(total)], [2*d2_lr(main, i, total, warm, factor, method) for i in range(total)])

@few
@given(epochs, per_epoch, st.data(), factors)
def test_detectron2_rescaled(n_epoch, n_iter, data, factor):
    "RESCALE_INTERVAL is our `delay=0` where the schedule knows only its length"
    total = n_epoch*n_iter
    warm = data.draw(st.integers(1, total - 1))
    for kind,options in (('cosine', dict(end=.1)), ('fixed', dict(decays=3, gamma=.3))):
        main = d2_main(kind, total, **options)
        f = schedule(n_epoch, n_iter, 2., {'fixed': 'fixed_gamma'}.get(kind, kind), warmup_iters=warm, factor=factor, ramp=True, delay=0, **options)
        same([f(i) for i in range(total)], [2*d2_lr(main, i, total, warm, factor, 'linear', rescale=True) for i in range(total)])

def test_detectron2_coco_1x():
    "90,000 iterations of the COCO baseline, all of them"
    f = with_ramp(multistep(.02, 90000, [60000, 80000]), 1000, 1e-3)
    main = d2_main('multistep', 90000, milestones=[60000, 80000], gamma=.1)
    i = [*range(1100), *range(59990, 60010), *range(79990, 80010), *range(1100, 90000, 97), 89999]
    same([f(k) for k in i], [.02*d2_lr(main, k, 90000, 1000, 1e-3, 'linear') for k in i])

def test_milestones_that_are_fractions_of_an_epoch():
    for n_iter in (3, 7, 30, 97, 1000):
        f = schedule(9, n_iter, 1., steps=[k/n_iter for k in range(1, 9*n_iter, 5)], gamma=.5)
        same([f(i) for i in range(9*n_iter)], [.5**((i + 4)//5) for i in range(9*n_iter)])

# ---------------------------------------------------------------- mmcv: the hook's two moments, played through

def mmcv_rates(regular, n_epoch, n_iter, by_epoch, warmup, warmup_iters, ratio):
    "Rate of every iteration: `regular(progress, length)` set at epoch starts or every iteration, times the warm-up's factor"
    rates,i = [],0
    for epoch in range(n_epoch):
        for _ in range(n_iter):
            lr = regular(epoch, n_epoch) if by_epoch else regular(i, n_epoch*n_iter)
            if i < warmup_iters:
                a = i/warmup_iters
                lr *= {'constant': ratio, 'linear': 1 - (1 - a)*(1 - ratio), 'exponential': ratio**(1 - a)}[warmup]
            rates.append(lr); i += 1
    return rates

def annealed(start, end, a): return end + .5*(start - end)*(math.cos(math.pi*a) + 1)

@few
@given(epochs, per_epoch, st.booleans(), methods, st.integers(0, 60), factors, st.floats(.3, .99))
def test_mmcv(n_epoch, n_iter, by_epoch, warmup, warm, ratio, gamma):
    base,unit = .02, 1 if by_epoch else n_iter           # gamma is per epoch or per iteration
    every = max(1, n_epoch//3)*unit
    later = round(n_epoch*unit*.75)
    ours = partial(schedule, n_epoch, n_iter, base, warmup_iters=warm, factor=ratio, method=warmup, per_epoch=by_epoch)
    cases = [(lambda t, n: base, ours(sched='flat')),
             (lambda t, n: max(base*gamma**(t//every), 1e-3), ours(sched='multistep', steps=[k/unit for k in range(every, n_epoch*unit, every)], gamma=gamma, min_lr=1e-3)),
             (lambda t, n: base*gamma**t, ours(sched='exponential', gamma=gamma**unit)),
             (lambda t, n: (base - 1e-4)*(1 - t/n)**2 + 1e-4, ours(sched='polynomial', power=2, end_lr=1e-4)),
             (lambda t, n: base*(1 + gamma*t)**-.75, ours(sched='inverse', gamma=gamma*unit, power=.75)),
             (lambda t, n: annealed(base, base*.05, t/n), ours(sched='cosine', end=.05)),
             (lambda t, n: annealed(base, 1e-3, t/n), ours(sched='cosine', end_lr=1e-3)),
             (lambda t, n: base if t < later else annealed(base, 1e-5, (t - later)/max(n - later, 1)), ours(sched='flat_cosine', start=later/unit, end_lr=1e-5) if later < n_epoch*unit else None)]
    for regular,f in cases:
        if f is None: continue
        want = mmcv_rates(regular, n_epoch, n_iter, by_epoch, warmup, warm, ratio)
        same([f(i) for i in range(n_epoch*n_iter)], want)

# ---------------------------------------------------------------- FastReID: its two torch schedulers, stepped as its hook steps them

def fastreid_rates(sched, n_epoch, n_iter, base, warm, factor, method, delay, milestones, gamma, eta_min):
    "Rates while a warm-up scheduler steps per iteration, and a main one per epoch once warm-up and delay are over"
    opt = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=base)
    length = n_epoch - max(math.ceil(warm/n_iter), delay)
    main = (torch.optim.lr_scheduler.CosineAnnealingLR(opt, length, eta_min) if sched == 'cosine' else
            torch.optim.lr_scheduler.MultiStepLR(opt, milestones, gamma))
    def rise(i):
        if i >= warm: return 1.
        return {'constant': factor, 'linear': factor*(1 - i/warm) + i/warm, 'exponential': factor**(1 - i/warm)}[method]
    ramp = torch.optim.lr_scheduler.LambdaLR(opt, rise)
    rates,i = [],0
    for epoch in range(n_epoch):
        for _ in range(n_iter):
            rates.append(opt.param_groups[0]['lr'])
            opt.step()
            if i + 1 <= warm: ramp.step()
            i += 1
        if i + 1 > warm and epoch + 1 > delay: main.step()
    return rates

@pytest.mark.filterwarnings('ignore')
@few
@given(st.integers(4, 14), per_epoch, methods, st.integers(0, 60), st.integers(0, 8), factors, st.sampled_from(['cosine', 'multistep']))
def test_fastreid(n_epoch, n_iter, method, warm, delay, factor, sched):
    assume(max(math.ceil(warm/n_iter), delay) < n_epoch)
    want = fastreid_rates(sched, n_epoch, n_iter, 3.5e-4, warm, factor, method, delay, [2, 5], .1, 7e-7)
    own = dict(end_lr=7e-7) if sched == 'cosine' else dict(steps=[2, 5])
    f = schedule(n_epoch, n_iter, 3.5e-4, sched, warmup_iters=warm, factor=factor, method=method, per_epoch=True, delay=delay, **own)
    np.testing.assert_allclose([f(i) for i in range(n_epoch*n_iter)], want, rtol=1e-9, atol=1e-13)

# ---------------------------------------------------------------- several groups, any place, the learner

@given(st.lists(st.floats(1e-5, 1), min_size=2, max_size=5), st.integers(0, 119), st.sampled_from(list(SCHEDULES)))
@few
def test_groups_keep_their_proportions(lrs, i, name):
    own = dict(multistep=dict(steps=[2, 4]), exponential=dict(gamma=.9), inverse=dict(gamma=.1)).get(name, {})
    make = partial(schedule, 6, 20, sched=name, warmup=1, **own)
    same(make(lr=lrs)(i), [make(lr=lr)(i) for lr in lrs])

class Rates(Callback):
    "Keeps the rates of every iteration; starts at iteration `start` of the whole training"
    order,run_valid = 70,False
    def __init__(self, start=0): self.start,self.seen = start,{}
    def before_train(self): self.learn.train_iter = max(self.train_iter, self.start)
    def before_batch(self): self.seen[self.train_iter] = [h['lr'] for h in self.opt.hypers]

def tiny(opt=None):
    torch.manual_seed(0)
    data = torch.utils.data.TensorDataset(torch.randn(64, 4), torch.randn(64, 1))
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    options = dict(opt_func=opt) if opt else {}
    learn = Learner(DataLoaders(DataLoader(data, bs=8), DataLoader(data, bs=8)), model, nn.MSELoss(), lr=.01,
                    splitter=lambda m: [list(m[0].parameters()), list(m[1].parameters())], **options)
    learn.remove_cb(ProgressCallback); learn.logger = lambda row: None
    return learn

@pytest.mark.parametrize('opt', [None, partial(OptimWrapper, opt=torch.optim.AdamW)])
def test_learner_trains_with_the_schedule(opt):
    learn,rates = tiny(opt),Rates()
    options = dict(sched='cosine', warmup_iters=5, factor=.1, end=.01)
    learn.fit_schedule(3, slice(1e-3, 1e-2), cbs=rates, **options)
    f = schedule(3, 8, [1e-3, 1e-2], **options)
    assert [rates.seen[i] for i in range(24)] == [f(i).tolist() for i in range(24)]
    assert all(type(lr) is float for h in rates.seen.values() for lr in h)     # numpy numbers would need pickle in a checkpoint

def test_continued_run_has_the_same_rates():
    learn,rates = tiny(),Rates()
    learn.fit_schedule(3, .01, 'multistep', steps=[1, 2.5], warmup=.5, cbs=rates)
    for start in (5, 8, 13, 23):
        again = Rates(start)
        tiny().fit_schedule(3, .01, 'multistep', steps=[1, 2.5], warmup=.5, cbs=again)
        for i in range(start, 24): assert again.seen[i] == rates.seen[i]

def test_param_groups_and_schedule_mean_the_same_factors():
    from functools import partial
    from posenb.callbacks import TorchOptimizer, param_groups
    learn = tiny()
    learn.splitter,learn.opt_func = partial(param_groups, lr_factors={'^0': .1}),partial(TorchOptimizer, opt=torch.optim.SGD)
    learn.fit_schedule(1, .02, 'flat', cbs=(rates := Rates()))
    same(sorted(set(rates.seen[3])), [.002, .02])

def test_lr_factors_of_groups():
    learn = tiny()
    learn.create_opt()
    learn.opt.set_hyper('lr_mult', [.1, 1.])
    same(group_lrs(learn.opt, .02), [.002, .02])
    same(group_lrs(learn.opt, .02), [.002, .02])                  # and again: it does not accumulate
    same(group_lrs(learn.opt, [.5, .25]), [.5, .25])
    rates = Rates()
    learn.fit_schedule(1, .02, 'flat', cbs=rates)
    same(rates.seen[3], [.002, .02])

def test_momentum_too():
    learn = tiny()
    learn.create_opt()
    seen = []
    class Mom(Callback):
        order,run_valid = 70,False
        def before_batch(self): seen.append(self.opt.hypers[0]['mom'])
    learn.fit(1, cbs=[Schedule(lambda n_iter: lambda i: .8 + .1*i/n_iter, 'mom'), Mom()])
    same(seen, [.8 + .1*i/8 for i in range(8)])

def test_bad_arguments():
    with pytest.raises(ValueError, match='cosine'): schedule(3, 10, sched='cos')
    with pytest.raises(ValueError, match='linear'): schedule(3, 10, sched='flat', warmup=1, method='quadratic')
    with pytest.raises(ValueError, match='none is left'): schedule(3, 10, sched='cosine', warmup=4, delay=0)
    with pytest.raises(ValueError, match='make it shorter'): schedule(3, 10, sched='cosine', warmup=3, ramp=True)
    with pytest.raises(TypeError, match='steps'): schedule(3, 10)
    with pytest.raises(ValueError, match='positive'): scale_lr(1e-3, -4, 8)
    learn = tiny()
    with pytest.raises(ValueError, match='cosine'): learn.fit_schedule(1, sched='cosin')

def test_picture_without_a_learner():
    import matplotlib
    matplotlib.use('Agg')
    ax = plot_schedule(schedule(4, 25, [1., .1], 'cosine', warmup=1), 100, 25, title='x')
    assert len(ax.lines) == 2 and ax.get_xlabel() == 'epoch'
    assert len(tiny().plot_schedule(4, .1, 'flat').lines) == 2
