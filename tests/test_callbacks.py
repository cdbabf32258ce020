"The callbacks against plain loops and closed forms, stopped and taken up again, alone and on two processes"
import copy, random, socket, traceback
from functools import partial
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from torch import multiprocessing, nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, TensorDataset
from fastai.callback.core import Callback, CancelBatchException, CancelTrainException
from fastai.callback.progress import CSVLogger, ProgressCallback
from fastai.callback.schedule import ParamScheduler, SchedCos
from fastai.callback.tracker import SaveModelCallback
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader as FastaiLoader
from fastai.learner import Learner
from fastai.optimizer import OptimWrapper
from posenb import callbacks
from posenb.callbacks import *
from posenb.schedule import *

torch.set_num_threads(1)
close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-6)

def net(seed=0, norm=True):
    torch.manual_seed(seed)
    bn = (lambda: nn.BatchNorm2d(4)) if norm else nn.Identity
    return nn.Sequential(nn.Conv2d(3, 4, 3), bn(), nn.ReLU(), nn.Sequential(nn.Conv2d(4, 4, 3), bn(), nn.ReLU()), nn.Flatten(), nn.Linear(64, 2))

def data(n, seed): return TensorDataset(*[torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed)) for shape in ((3, 8, 8), (2,))])

def learner(cbs=(), model=None, n=48, bs=4, opt=torch.optim.Adam, lr=.01, device='cpu', shuffle=False, **kwargs):
    dls = DataLoaders(DataLoader(data(n, 1), bs, shuffle=shuffle), DataLoader(data(8, 2), 4), device=device)
    learn = Learner(dls, model or net(), nn.MSELoss(), lr=lr, cbs=list(cbs), opt_func=partial(OptimWrapper, opt=opt), **kwargs)
    learn.logger = lambda *_: None
    if not any(isinstance(cb, ProgressCallback) for cb in cbs): learn.remove_cb(ProgressCallback)
    return learn

def weights(model): return torch.cat([t.detach().double().flatten() for t in model.state_dict().values()])
class Do(Callback):
    "Calls functions of the learner, by event"
    def __init__(self, order=90, **events):
        for name,f in events.items(): setattr(self, name, partial(lambda f: f(self.learn), f))
        self.order = order

# -- precision ------------------------------------------------------------------------------------
def test_bf16_is_autocast_around_the_forward():
    learn = learner([Precision('bf16')]); learn.fit(2)
    model = net(); opt = torch.optim.Adam(model.parameters(), lr=.01)
    for _ in range(2):
        for x,y in learn.dls.train:
            with torch.autocast('cpu', torch.bfloat16): pred = model(x)
            mse_loss(pred.float(), y).backward(); opt.step(); opt.zero_grad()
    assert torch.equal(weights(learn.model), weights(model))

def test_fp16_leaves_out_steps_that_overflow():
    precision,ema = Precision('fp16', init_scale=2.**40, growth_interval=10**6),EMA()
    scales,moved,before = [],[],[weights(net()[0])]
    def look(learn):
        scales.append(precision.scaler.get_scale()); moved.append(not torch.equal(weights(learn.model[0]), before[0])); before[0] = weights(learn.model[0])
    learn = learner([precision, ema, ClipGrad(1.), Do(after_step=look)]); learn.fit(4)
    assert scales[0] == 2.**39 and scales[-1] < 2.**30 and not moved[0] and moved[-1]
    assert ema.steps == sum(moved)
    assert precision.state_dict()['scale'] == scales[-1]
    other = Precision('fp16'); other.load_state_dict(precision.state_dict())
    learn = learner([other]); learn.fit(1)
    assert other.scaler.get_scale() == scales[-1]

def test_scaled_gradients_are_clipped_as_they_are():
    "A scale changes nothing but the rounding of float16, and a power of two not even that"
    models = []
    for scale in (1., 2.**8):
        learn = learner([Precision('fp16', init_scale=scale, growth_interval=10**6), ClipGrad(.1)], opt=torch.optim.SGD); learn.fit(1)
        models.append(weights(learn.model))
    torch.testing.assert_close(*models, rtol=1e-3, atol=1e-4)

def test_precision_is_left_when_the_forward_fails():
    def fail(*_): raise MemoryError('full')
    learn = learner([Precision('bf16')])
    handle = learn.model[5].register_forward_hook(fail)
    with pytest.raises(MemoryError): learn.fit(1)
    assert not torch.is_autocast_enabled('cpu')
    handle.remove(); learn.fit(1)
    assert 'forward' not in vars(learn.model)
    assert torch.is_autocast_enabled('cpu') is False

def test_a_copy_during_the_fit_is_a_model_of_its_own():
    copies = []
    def take(learn):
        model = copy.deepcopy(learn.model)
        for p in model.parameters(): nn.init.zeros_(p)
        copies.append(model(torch.ones(1, 3, 8, 8)))
    learner([Precision('bf16'), Do(after_epoch=take)]).fit(1)
    assert copies[0].abs().sum() == 0 and copies[0].dtype == torch.float32

def test_precision_says_what_it_can_do():
    with pytest.raises(ValueError, match="'bf16' or 'fp16'"): Precision('int8')
    with pytest.raises(ValueError, match='init_scale'): Precision('bf16', init_scale=2.)

def test_compiled_in_place():
    keys = list(net().state_dict())
    results = []
    for compiled in (False, True):
        learn = learner([Precision('bf16'), EMA()])
        if compiled: learn.model.compile(backend='aot_eager')
        learn.fit(1); results.append(weights(learn.model))
        assert list(learn.model.state_dict()) == keys
    torch.testing.assert_close(*results, rtol=1e-2, atol=1e-2)

# -- averaged weights -----------------------------------------------------------------------------
@settings(max_examples=8, deadline=None)
@given(st.floats(1e-4, .5), st.integers(1, 10**5), st.booleans())
def test_ema_is_the_closed_form_and_training_does_not_notice(momentum, warm_up, fast_start):
    history = []
    keep = lambda learn: history.append(weights(learn.model))
    learn = learner([EMA(momentum, warm_up, fast_start), Do(before_train=lambda learn: history or keep(learn), after_step=keep)]); learn.fit(2)
    plain = learner(); plain.fit(2)
    assert torch.equal(history[-1], weights(plain.model))
    average = history[0]
    for n,w in enumerate(history[1:]): average = average + ema_momentum(n, momentum, warm_up, fast_start)*(w-average)
    names = [k for k,t in learn.model.state_dict().items() for _ in range(t.numel())]
    counted = torch.tensor(['num_batches' not in k for k in names])
    torch.testing.assert_close(weights(learn.model)[counted], average[counted], rtol=1e-4, atol=1e-5)
    assert torch.equal(weights(learn.model)[~counted], history[-1][~counted])

def test_mmcv_warm_up():
    for n in (0, 1, 10, 10**4): assert ema_momentum(n, .5, 100) == min(.5, (1+n)/(100+n))

def test_ema_in_validations_within_validations():
    "Someone fetches predictions after each validation: before and after, the average is in the model"
    seen = []
    def note(learn): seen.append(weights(learn.model))
    def fetch(learn):
        if len(seen) % 2 == 0: note(learn); learn._do_epoch_validate(); note(learn)
    learn = learner([ema := EMA(.1)])
    calls = Do(order=10); depth = [0]
    def after(learn):
        if depth[0]: return
        depth[0] = 1; note(learn); learn._do_epoch_validate(); note(learn); depth[0] = 0
    calls.after_validate = lambda: after(learn)
    learn.add_cb(calls); learn.fit(2)
    assert torch.equal(seen[0], seen[1]) and torch.equal(seen[2], seen[3]) and torch.equal(seen[3], weights(learn.model))
    assert ema.validating == 0

def test_interrupted_validation_keeps_the_training_weights():
    learn = learner([EMA(.1)])
    def interrupt(learn):
        if not learn.training: raise KeyboardInterrupt('stop')
    stop = Do(after_loss=interrupt)
    with pytest.raises(KeyboardInterrupt): learn.fit(1, cbs=stop)
    learn.remove_cb(stop)
    plain = learner(); plain.fit(1)
    assert not torch.equal(weights(plain.model), weights(learn.model))
    learn.ema.leave()
    assert torch.equal(weights(plain.model), weights(learn.model))

def test_validate_and_predict_leave_the_average_alone():
    learn = learner([EMA(.1)]); learn.fit(1)
    before,average = weights(learn.model),[a.clone() for a in learn.ema.average]
    learn.validate(); learn.get_preds(dl=learn.dls.valid)
    assert torch.equal(before, weights(learn.model)) and all(map(torch.equal, average, learn.ema.average))

def test_evaluation_of_a_loaded_average():
    first = learner([EMA(.1, fast_start=True)]); first.fit(1)
    loss = first.validate()[0]
    first.ema.swap()
    state = dict(steps=first.ema.steps, average=dict(zip(first.ema.tensor_names, first.ema.tensors)))
    first.ema.swap()
    state['average'] = {k: v.detach().clone() for k,v in callbacks._averaged(first.model).items()}
    second = learner([EMA()]); second.ema.load_state_dict(state)
    assert second.validate()[0] == loss
    with pytest.raises(ValueError, match='another model'):
        third = learner([EMA()], model=net(norm=False)); third.ema.load_state_dict(state); third.fit(1)

# -- evaluation -----------------------------------------------------------------------------------
@pytest.mark.parametrize('every,epochs', [(1, 3), (2, 5), (2, 4), (3, 4), (9, 2)])
def test_mmdetection_workflow(every, epochs):
    "[('train', every), ('val', 1)]: losses of validation after every so many epochs, and after the last"
    evaluated = []
    learn = learner([EvalEvery(every), Do(after_validate=lambda learn: evaluated.append(learn.epoch) if not learn.recorder.cancel_valid else None)])
    learn.fit(epochs)
    workflow,epoch = [],0
    while epoch < epochs:
        for mode,n in (('train', every), ('val', 1)):
            for _ in range(n):
                if mode == 'train' and epoch < epochs: epoch += 1
                elif mode == 'val': workflow.append(epoch-1)
    assert evaluated == workflow
    values = np.array(learn.recorder.values, dtype=float)
    assert values.shape == (epochs, 2) and [i for i in range(epochs) if not np.isnan(values[i, 1])] == workflow and not np.isnan(values[:, 0]).any()

def test_rows_stay_aligned_for_trackers_loggers_and_bars(tmp_path):
    learn = learner([EvalEvery(2)], metrics=[mse_loss], path=tmp_path)
    learn.fit(5, cbs=[ProgressCallback(), CSVLogger(), SaveModelCallback(monitor='mse_loss', fname='best')])
    lines = (tmp_path/'history.csv').read_text().split()
    assert len({len(line.split(',')) for line in lines}) == 1 and len(lines) == 6
    assert (tmp_path/'models'/'best.pth').exists()

@pytest.mark.parametrize('iters', [1, 5, 12, 17, 100])
def test_by_iterations(iters):
    seen = []
    freeze = [FreezeBN('^1'), FreezeLayers('^3', until=15)]
    def modes(learn): seen.append((learn.train_iter, learn.training, [m.training for m in learn.model.modules()]))
    learn = learner([EvalEvery(iters=iters), ProgressCallback(), *freeze, Do(after_batch=modes)]); learn.fit(3)
    train = [o for o in seen if o[1]]; seen.clear()
    plain = learner([Do(after_batch=modes), FreezeBN('^1'), FreezeLayers('^3', until=15)]); plain.fit(3)
    assert train == [o for o in seen if o[1]]
    assert torch.equal(weights(plain.model), weights(learn.model)) and len(learn.recorder.losses) == 36
    assert [r['iteration'] for r in learn.eval_every.rows] == [*range(iters, 36, iters), 36]
    assert learn.eval_every.rows[-1]['valid_loss'] == plain.recorder.values[-1][1]
    values = np.array(learn.recorder.values, dtype=float)
    assert values.shape == (3, 2) and values[-1, 1] == plain.recorder.values[-1][1]
    assert np.isnan(values[:2, 1]).tolist() == [not any(12*e < i <= 12*e+12 for i in range(iters, 37, iters)) for e in (0, 1)]

def test_failed_evaluation_leaves_the_training_as_it_was():
    learn,seen = learner([FreezeBN('^1'), EvalEvery(iters=5)]),[]
    def fail(learn):
        if not learn.training: raise MemoryError('full')
    def look(learn): seen.append((learn.training, learn.iter, [m.training for m in learn.model.modules()], learn.dl is learn.dls.train))
    learn.add_cbs([Do(after_pred=fail), Do(-10, after_batch=look)])
    with pytest.raises(MemoryError): learn.fit(1)
    look(learn)
    assert seen[-1] == seen[-2]

def test_validate_is_never_cancelled():
    learn = learner([EvalEvery(7)])
    assert np.isfinite(learn.validate()[0])

# -- memory ---------------------------------------------------------------------------------------
def test_checkpointed_activations():
    plain,thrifty = net(),net()
    assert checkpoint_activations(thrifty, '3') == ['3']
    x = torch.randn(4, 3, 8, 8)
    for model in (plain, thrifty): model(x).square().mean().backward()
    assert torch.equal(weights(plain), weights(thrifty))
    for p,q in zip(plain.parameters(), thrifty.parameters()): assert torch.equal(p.grad, q.grad)
    clone = copy.deepcopy(thrifty)
    with torch.no_grad():
        for p in clone.parameters(): p.zero_()
        assert clone(x).abs().sum() == 0 and thrifty(x).abs().sum() > 0
    for norm in (plain[3][1], thrifty[3][1]): assert norm.num_batches_tracked in (1, 2)

# -- batch normalisation --------------------------------------------------------------------------
@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(2, 40), min_size=1, max_size=6), st.floats(-1e3, 1e3))
def test_population_statistics(sizes, offset):
    "As fvcore defines them, in double precision: E[x] and E[x^2] - E[x]^2 over all values, batches of different sizes"
    g = torch.Generator().manual_seed(sum(sizes))
    batches = [torch.randn(n, 3, generator=g)*(i+1) + offset + i for i,n in enumerate(sizes)]
    norm = nn.BatchNorm1d(3)
    precise_bn(norm, ((b,) for b in batches))
    x = torch.cat(batches).double()
    torch.testing.assert_close(norm.running_mean.double(), x.mean(0), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(norm.running_var.double(), x.square().mean(0) - x.mean(0).square(), rtol=1e-3, atol=1e-4)
    assert norm.momentum == .1

def test_frozen_statistics_stay_frozen_with_precise_ones():
    learn = learner([FreezeBN('^1'), PreciseBN(5), EvalEvery(iters=7)])
    before = learn.model[1].running_mean.clone(); learn.fit(2)
    assert torch.equal(learn.model[1].running_mean, before) and not torch.equal(learn.model[3][1].running_mean, torch.zeros(4))

def test_precise_statistics_are_those_of_the_average():
    learn = learner([EMA(.3), PreciseBN(100)]); learn.fit(2)
    stats = [m.running_var.clone() for m in learn.model.modules() if isinstance(m, nn.BatchNorm2d)]
    learn.model.train(); precise_bn(learn.model, [(x,) for x,_ in learn.dls.train])
    for a,m in zip(stats, [m for m in learn.model.modules() if isinstance(m, nn.BatchNorm2d)]): close(a, m.running_var)

def test_precise_statistics_leave_no_trace_in_generators():
    states = []
    for cbs in ([], [PreciseBN(5)]):
        torch.manual_seed(0); random.seed(0); np.random.seed(0)
        learner(cbs, shuffle=True).fit(2); states.append((torch.rand(1), random.random()))
    assert states[0] == states[1]

class EpochLoader(FastaiLoader):
    "Writes the epoch into its dataset, which the items depend on"
    epoch = 0
    def before_iter(self): self.dataset.epoch = self.epoch
    def after_iter(self): self.epoch += 1

class EpochData(TensorDataset):
    epoch = 0
    def __getitem__(self, i):
        x,y = super().__getitem__(i)
        return x + self.epoch,y

def loaders():
    "Ways to load the training set"
    dataset,g = EpochData(*data(48, 1).tensors),torch.Generator().manual_seed(3)
    yield EpochLoader(dataset, bs=4, shuffle=True)
    yield DataLoader(dataset, 4, shuffle=True, generator=g)
    yield DataLoader(dataset, 4, shuffle=True, num_workers=1, persistent_workers=True)

@pytest.mark.parametrize('i', range(3))
def test_precise_statistics_do_not_disturb_the_pass_they_interrupt(i):
    results = []
    for cbs in ([EvalEvery(iters=5)], [PreciseBN(3), EvalEvery(iters=5)]):
        torch.manual_seed(0); random.seed(0)
        learn = learner(cbs); learn.dls.loaders[0] = list(loaders())[i]
        learn.fit(2); results.append(torch.stack(list(learn.recorder.losses)))
    assert torch.equal(*results)

def test_precise_statistics_need_a_batch():
    with pytest.raises(ValueError, match='no batch'): precise_bn(nn.BatchNorm1d(3), [])

# -- freezing -------------------------------------------------------------------------------------
def test_frozen_layers_do_not_decay_nor_stay_frozen():
    opt = partial(torch.optim.SGD, momentum=.9, weight_decay=.5)
    learn = learner([FreezeLayers(r'^(0|1|3)\b')], opt=opt)
    for p in learn.model.parameters(): p.grad = torch.zeros_like(p)
    before = copy.deepcopy(learn.model); learn.fit(1)
    for i in (0, 1, 3): assert torch.equal(weights(learn.model[i]), weights(before[i]))
    assert not torch.equal(weights(learn.model[5]), weights(before[5]))
    assert all(p.requires_grad for p in learn.model.parameters()) and not any(m.training for m in learn.model.modules())
    with pytest.raises(ValueError, match='no parameter'): learner([FreezeLayers('head')]).fit(1)
    with pytest.raises(ValueError, match='no batch normalisation'): learner([FreezeBN('head')]).fit(1)

def test_what_was_frozen_before_stays_so():
    learn = learner([FreezeLayers('^0', until=3)])
    learn.model[0].bias.requires_grad_(False); learn.fit(1)
    assert not learn.model[0].bias.requires_grad and learn.model[0].weight.requires_grad

# -- gradients ------------------------------------------------------------------------------------
@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0, 100), min_size=1, max_size=5), st.floats(.01, 10))
def test_each_norm_is_torchs_one_by_one(scales, limit):
    g = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.zeros(4)) for _ in scales]
    for p,s in zip(params, scales): p.grad = torch.randn(4, generator=g)*s
    alone = copy.deepcopy(params)
    for p,q in zip(params, alone): q.grad = p.grad.clone(); nn.utils.clip_grad_norm_([q], limit)
    clip_each_norm_(params, limit)
    for p,q in zip(params, alone): close(p.grad, q.grad)

def test_limits_act():
    seen = {}
    def look(learn): seen[name] = max(p.grad.abs().max().item() for p in learn.model.parameters())
    for name,clip in dict(value=ClipGrad(value=1e-3), each=ClipGrad(each_norm=1e-3), norm=ClipGrad(1e-3)).items(): learner([clip, Do(before_step=look)], n=4).fit(1)
    assert max(seen.values()) <= 1.001e-3
    assert clip.grad_norm > 1e-3
    with pytest.raises(ValueError, match='limit'): ClipGrad()

@pytest.mark.parametrize('n', [8, 12, 20, 28])
def test_accumulated_gradients_are_those_of_the_large_batch(n):
    small,large = [learner(cbs, net(norm=False), n=n, bs=bs, opt=torch.optim.SGD) for cbs,bs in (([Accumulate(4), EMA()], 2), ([EMA()], 8))]
    small.fit(2); large.fit(2)
    close(weights(small.model), weights(large.model)); assert small.ema.steps == large.ema.steps == 2*-(-n//8)

def test_a_broken_off_epoch_leaves_no_gradients():
    def stop(learn):
        if learn.iter == 1 and learn.training: raise CancelTrainException
    learn = learner([Accumulate(4), Do(after_batch=stop)]); before = weights(learn.model[0]); learn.fit(2)
    assert torch.equal(weights(learn.model[0]), before)
    assert all(p.grad is None or p.grad.abs().sum() == 0 for p in learn.model.parameters())

@settings(max_examples=20, deadline=None)
@given(st.floats(0, 2), st.floats(0, 2), st.floats(.1, 3), st.dictionaries(st.sampled_from(['^0', '^3', 'bias', 'weight']), st.floats(.01, 2)))
def test_every_parameter_is_in_one_group(norm_decay, bias_decay, bias_lr, lr_factors):
    model = net()
    groups = param_groups(model, norm_decay, bias_decay, bias_lr, lr_factors)
    found = [id(p) for g in groups for p in g['params']]
    assert sorted(found) == sorted(id(p) for p in model.parameters())
    assert len({(g['lr_mult'], g['wd_mult']) for g in groups}) == len(groups)
    factor = {id(p): (g['lr_mult'], g['wd_mult']) for g in groups for p in g['params']}
    expected = np.prod([lr_factors.get(k, 1.) for k in ('^0', 'bias')])*bias_lr, bias_decay
    np.testing.assert_allclose(factor[id(model[0].bias)], expected)
    np.testing.assert_allclose(factor[id(model[1].bias)], (lr_factors.get('bias', 1.), norm_decay))

@pytest.mark.parametrize('opt', [torch.optim.SGD, partial(torch.optim.SGD, momentum=.9, nesterov=True), torch.optim.Adam, partial(torch.optim.AdamW, fused=True)])
def test_factors_survive_schedules_and_resumes(opt):
    learn = learner(splitter=partial(param_groups, lr_factors={'^0': .5}))
    learn.opt_func = partial(TorchOptimizer, opt=opt, wd=.1)
    learn.fit(1, cbs=ParamScheduler({'lr': SchedCos(1e-2, 1e-3)}))
    assert learn.opt.hypers[-1]['lr'] < 2e-3
    factors = [h['lr']/learn.opt.hypers[-1]['lr'] for h in learn.opt.hypers]
    assert sorted(set(np.round(factors, 6))) == [.5, 1]
    state = copy.deepcopy(learn.opt.state_dict())
    learn.create_opt(); learn.opt.load_state_dict(state); learn.opt.set_hyper('lr', .1)
    assert {round(h['lr'], 9) for h in learn.opt.hypers} == {.05, .1} and {round(h['wd'], 9) for h in learn.opt.hypers} == {0., .1}

@pytest.mark.parametrize('lr,first', [(.1, .05), ([.1]*4, .1)])
def test_schedules_apply_factors_once(lr, first):
    "A number is what the factors multiply; a list has the rate of each group"
    learn,rates = learner(splitter=partial(param_groups, lr_factors={'^0': .5})),[]
    learn.opt_func = partial(TorchOptimizer, opt=torch.optim.SGD)
    learn.fit_schedule(1, lr, 'flat', cbs=Do(before_step=lambda learn: rates.append([g['lr'] for g in learn.opt.param_groups])))
    assert len(rates) == 12 and set(rates[0]) == {first, .1} and all(r == rates[0] for r in rates)

# -- health ---------------------------------------------------------------------------------------
class NanAt:
    "Mean squared error, and a part that is not a number at one iteration"
    def __init__(self, at): self.at,self.n = at,-1
    def __call__(self, pred, target):
        self.n += pred.requires_grad
        self.parts = dict(good=mse_loss(pred, target), bad=pred.mean()*(float('inf') if self.n == self.at else 0))
        return sum(self.parts.values())

@pytest.mark.parametrize('every,at,iteration,accumulate', [(1, 5, 5, 1), (1, 5, 5, 4), (5, 6, 6, 1), (7, 23, 23, 1), (100, 3, 3, 1)])
def test_stops_and_names_what_was_bad(every, at, iteration, accumulate):
    history = []
    learn = learner([CheckFinite(every), Accumulate(accumulate), Do(after_batch=lambda learn: history.append(weights(learn.model[5])))])
    learn.loss_func = NanAt(at)
    learn.dls.train.last_names = lambda: ['a.jpg', 'b.jpg']
    with pytest.raises(FloatingPointError) as e: learn.fit(3)
    for text in (f'iteration {iteration} ', f'epoch {iteration//12}', 'bad = ', 'good = ', 'a.jpg, b.jpg'): assert text in str(e.value)
    if every == 1: assert torch.equal(weights(learn.model[5]), history[-1]) and len(history) == at

def test_unused():
    model = net(); model[0].extra = nn.Conv2d(1, 1, 1)
    assert unused_parameters(model, model(torch.ones(2, 3, 8, 8)).sum()) == ['0.extra.weight', '0.extra.bias']
    with pytest.warns(UserWarning, match='2 parameters get no gradient: 0.extra.weight, 0.extra.bias'): learner([WarnUnused()], model).fit(1)

@pytest.mark.parametrize('first', [True, False])
def test_frozen_layers_that_thaw_leave_frozen_statistics_alone(first):
    modes,cbs = [],[FreezeBN('^1'), FreezeLayers('^[13]', until=5)]
    learn = learner([*(cbs if first else cbs[::-1]), Do(after_pred=lambda learn: modes.append([m.training for m in (learn.model[1], learn.model[3][1])]))])
    learn.fit(2)
    assert [m for m in modes if any(m)] == [[False, True]]*19

def test_a_compiled_module_is_its_model():
    def trained(wrap):
        model = net()
        learn = learner([Precision('bf16'), EMA(.1), FreezeLayers('^3', until=3), FreezeBN('^1'), PreciseBN(3)], wrap(model)); learn.fit(1)
        return weights(model),list(learn.ema.state_dict()['average'])
    plain,compiled = trained(lambda m: m),trained(partial(torch.compile, backend='eager'))
    close(plain[0], compiled[0], rtol=1e-4, atol=1e-5)
    assert plain[1] == compiled[1]

# -- stopping and going on ------------------------------------------------------------------------
class Stop(Callback):
    "Keeps the whole state after `at` iterations, as it would be stored, and leaves"
    order = 66
    def __init__(self, at): self.at,self.kept = at,None
    def after_batch(self):
        if not self.training or self.train_iter != self.at: return
        state = dict(model=self.model.state_dict(), opt=self.opt.state_dict(), epoch=self.epoch, iter=self.iter+1,
                     cbs={cb.name: cb.state_dict() for cb in self.learn.cbs if hasattr(type(cb), 'state_dict')})
        torch.save(copy.deepcopy(state), self.learn.path/'state.pth')
        raise KeyboardInterrupt('stopped')

class GoOn(Callback):
    "Takes up what `Stop` left: skips the epochs and batches that were done"
    def __init__(self, order): self.order = order
    def before_fit(self):
        s = torch.load(self.learn.path/'state.pth', weights_only=True)
        self.model.load_state_dict(s['model']); self.opt.load_state_dict(s['opt'])
        for cb in self.learn.cbs:
            if cb.name in s['cbs']: cb.load_state_dict(s['cbs'][cb.name])
        self.first,self.skip = s['epoch'],s['iter']
    def before_train(self):
        if self.epoch == self.first: self.learn.train_iter = 12*self.first
    def before_batch(self):
        if self.training and self.epoch == self.first and self.iter < self.skip: raise CancelBatchException

class ResumedLearner(Learner):
    def _do_fit(self):
        for self.epoch in range(getattr(self.go_on, 'first', 0), self.n_epoch): self._with_events(self._do_epoch, 'epoch', CancelBatchException)

@pytest.mark.parametrize('at,order', [(1, 65), (7, 65), (12, -20), (13, 65), (22, -20), (30, 65), (35, 65)])
@pytest.mark.parametrize('dtype', ['bf16', 'fp16'])
def test_every_state_resumes_to_the_bit(tmp_path, at, order, dtype):
    def cbs(): return [Precision(dtype, **(dict(init_scale=2.**30, growth_interval=3) if dtype == 'fp16' else {})), ChannelsLast(), Accumulate(5), ClipGrad(1.),
                       EMA(.1, 30), EvalEvery(iters=4), CheckFinite(), PreciseBN(3), FreezeBN('^1'), FreezeLayers('^0', until=20), WarnUnused()]
    whole = learner(cbs()); whole.fit(3)
    stopped = learner([*cbs(), Stop(at)], path=tmp_path)
    with pytest.raises(KeyboardInterrupt): stopped.fit(3)
    resumed = learner([*cbs(), GoOn(order)], net(7), path=tmp_path)
    resumed.__class__ = ResumedLearner; resumed.fit(3)
    assert torch.equal(weights(whole.model), weights(resumed.model))
    assert whole.eval_every.rows == resumed.eval_every.rows
    assert np.array_equal(whole.recorder.values[-1][1:], resumed.recorder.values[-1][1:])

# -- two processes --------------------------------------------------------------------------------
def alone(rank, port, job, out):
    torch.set_num_threads(1)
    torch.distributed.init_process_group('gloo', init_method=f'tcp://127.0.0.1:{port}', rank=rank, world_size=2)
    try: out.put((rank, job(rank)))
    except Exception: out.put((rank, traceback.format_exc()))
    torch.distributed.destroy_process_group()

def jobs(rank): return dict(finite=job_finite(rank), bn=job_bn(rank), steps=job_steps(rank), frozen=job_frozen(rank), shared=job_shared(rank))

def job_finite(rank):
    learn = learner([CheckFinite()], nn.parallel.DistributedDataParallel(net(norm=False))); learn.loss_func = NanAt(4 if rank else 99)
    try: learn.fit(1)
    except FloatingPointError as e: return learn.train_iter,str(e)

def job_bn(rank):
    norm = nn.BatchNorm1d(3)
    precise_bn(norm, ((b,) for b in halves()[rank]))
    return norm.running_mean.tolist(),norm.running_var.tolist()

def halves():
    g = torch.Generator().manual_seed(0)
    return [[torch.randn(n, 3, generator=g)*n for n in sizes] for sizes in ((4, 8), (5, 3, 9))]

def ddp(rank, cbs):
    "A learner on every second sample, batches of 2"
    model = nn.parallel.DistributedDataParallel(net(norm=False))
    learn = learner(cbs, model, opt=torch.optim.SGD)
    part = torch.utils.data.Subset(data(48, 1), list(range(rank, 48, 2)))
    learn.dls.loaders[0] = DataLoader(part, 2)
    learn.fit(1)
    return weights(model.module).tolist()

def job_steps(rank): return ddp(rank, [Accumulate(5), ClipGrad(.5), EMA(.1, fast_start=True), CheckFinite(3)])
def job_frozen(rank): return ddp(rank, [FreezeLayers('^0', until=6)])

class Numbered:
    def __init__(self): self.x = torch.arange(51.)
    def __len__(self): return len(self.x)
    def __getitem__(self, i): return self.x[i].expand(4, 2),torch.zeros(2)

class EpochLoader(FastaiLoader):
    "Shuffles by its epoch"
    epoch,n_inp = 0,1
    def randomize(self): self.rng = random.Random(self.epoch)
    def after_iter(self): self.epoch += 1

def job_shared(rank):
    "What `PreciseBN` reads in two epochs, and the statistics it gets, of a layer that is the first"
    seen = [[]]
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Flatten(), nn.Linear(8, 2))
    train = EpochLoader(Numbered(), bs=4, shuffle=True, drop_last=True)
    learn = Learner(DataLoaders(train, FastaiLoader(Numbered(), bs=4)), model, nn.MSELoss(), lr=.01, cbs=[PreciseBN(100), Do(EMA.order+2, before_validate=lambda learn: seen.append([]))])
    learn.remove_cb(ProgressCallback); learn.logger = lambda *_: None
    model[0].register_forward_pre_hook(lambda m,x: seen[-1].extend(x[0][:, 0, 0].tolist()) if m.momentum == 1 else None)
    learn.fit(2)
    return seen[:2],model[0].running_mean.tolist()

def test_two_processes():
    with socket.socket() as s: s.bind(('', 0)); port = s.getsockname()[1]
    context = multiprocessing.get_context('spawn')
    out = context.SimpleQueue()
    processes = [context.Process(target=alone, args=(rank, port, jobs, out)) for rank in range(2)]
    for p in processes: p.start()
    for p in processes: p.join(400)
    results = dict(out.get() for _ in processes)
    for r in results.values(): assert isinstance(r, dict), r
    assert results[0]['finite'][0] == results[1]['finite'][0] == 4
    assert 'another process' in results[0]['finite'][1] and 'bad = ' in results[1]['finite'][1] and 'on process 1' in results[1]['finite'][1]
    for epoch in range(2):
        first,second = (results[r]['shared'][0][epoch] for r in range(2))
        assert len(first) == len(second) == 24 and len(set(first + second)) == 48, 'an image was read twice, or not at all'
    assert results[0]['shared'][0][0] != results[0]['shared'][0][1]
    close(torch.tensor(results[0]['shared'][1]), torch.full((4,), sum(first + second)/48)); assert results[0]['shared'][1] == results[1]['shared'][1]
    x = torch.cat(sum(halves(), []))
    for r in results.values():
        close(torch.tensor(r['bn'][0]), x.mean(0)); close(torch.tensor(r['bn'][1]), x.var(0, correction=0), rtol=1e-4)
    for job,cbs in dict(steps=[Accumulate(5), ClipGrad(.5), EMA(.1, fast_start=True)], frozen=[FreezeLayers('^0', until=6)]).items():
        single = learner(cbs, net(norm=False), opt=torch.optim.SGD); single.fit(1)
        assert results[0][job] == results[1][job]
        close(torch.tensor(results[0][job]), weights(single.model).float().double().to(torch.get_default_dtype()))

# -- with a GPU -----------------------------------------------------------------------------------
@pytest.mark.gpu
@pytest.mark.parametrize('dtype', ['bf16', 'fp16'])
def test_on_a_gpu(dtype):
    def cbs(): return [Precision(dtype), ChannelsLast(), ClipGrad(1., value=1., each_norm=1.), EMA(.1), EvalEvery(2), CheckFinite(3), PreciseBN(3)]
    learn = learner(cbs(), device='cuda'); learn.fit(3)
    assert torch.isfinite(weights(learn.model)).all()
    bad = learner([Precision(dtype), CheckFinite()], device='cuda'); bad.loss_func = NanAt(3)
    with pytest.raises(FloatingPointError, match='iteration 3 '): bad.fit(1)
    compiled = learner(cbs(), device='cuda'); compiled.model.compile(); compiled.fit(1)
    assert list(compiled.model.state_dict()) == list(net().state_dict())
