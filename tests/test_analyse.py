"Counting: the known numbers of the named networks, PyTorch's own counter, and formulas by hand"
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from posenb.analyse import analyse, operations, show_analysis
from posenb.model import fuse_bn, higher_hrnet

@pytest.mark.parametrize('arch,joints,size,parameters,gmacs', [
    ('w32', 17, 512, 28_645_331, 46.203), ('w48', 17, 640, 63_827_139, 149.469),
    ('w32', 14, 512, 28_641_962, 46.144), ('w48', 14, 640, 63_822_090, 149.329)])
def test_published(arch, joints, size, parameters, gmacs):
    with torch.device('meta'): model = higher_hrnet(arch, joints)
    total = analyse(model, size).loc['total']
    assert total.parameters == parameters and round(total.GMACs, 3) == gmacs
    assert total.GFLOPs == pytest.approx(2*total.GMACs) and total['conv share'] == 1

def test_parts_of_w32():
    table = analyse(higher_hrnet('w32'), 512)
    expected = dict(conv1=1728, bn1=128, conv2=36864, bn2=128, layer1=286208, transition1=221376, stage2=390848, transition2=73984, stage3=6821632,
                    transition3=295424, stage4=20407232, final_layers=1683, deconv_layers=108096)
    assert table.parameters.drop('total').to_dict() == expected

def test_pytorchs_counter_on_real_numbers():
    "The same as a pass with numbers, whatever the mode"
    model,image = higher_hrnet('tiny'),torch.zeros(1, 3, 96, 64)
    with torch.no_grad(), FlopCounterMode(display=False) as counter: outputs = model(image)
    for train in (True, False):
        ops = operations(model.train(train), (96, 64))
        assert 2*ops.MACs.sum() == counter.get_total_flops()
        assert [s for s in ops['shape'][ops.module.str.startswith('final')]] == [tuple(o.shape) for o in outputs]
    assert analyse(fuse_bn(model), 64).loc['total'].GMACs == analyse(model, 64).loc['total'].GMACs

@pytest.mark.parametrize('depth', [1, 2, 3, 4, 7, None])
def test_rows_add_up(depth):
    model = higher_hrnet('tiny')
    table = analyse(model, 64, depth=depth)
    assert table.index.is_unique and table.index[-1] == 'total'
    np.testing.assert_allclose(table.iloc[:-1].drop(columns='conv share').sum(), table.drop(columns='conv share').loc['total'], rtol=1e-12)
    assert table.loc['total'].to_dict() == pytest.approx(analyse(model, 64).loc['total'].to_dict())
    if depth is None: assert set(table.index[:-1]) == {n for n,m in model.named_modules() if [*m.parameters(recurse=False)]}

@settings(max_examples=25, deadline=None)
@given(cin=st.integers(1, 3), cout=st.integers(1, 3), groups=st.integers(1, 3), kernel=st.integers(1, 4), stride=st.integers(1, 3),
       padding=st.integers(0, 2), dilation=st.integers(1, 2), size=st.integers(9, 20), up=st.booleans())
def test_convolutions(cin, cout, groups, kernel, stride, padding, dilation, size, up):
    kind = nn.ConvTranspose2d if up else nn.Conv2d
    conv = kind(cin*groups, cout*groups, kernel, stride, padding, groups=groups, dilation=dilation)
    image = torch.zeros(1, cin*groups, size, size+1)
    out = conv(image)
    met = image if up else out                    # each weight is met at each pixel of this map
    row = analyse(conv, (size, size+1), channels=cin*groups).loc['total']
    assert row.GMACs*1e9 == pytest.approx(conv.weight.numel()*met[0, 0].numel()) and row['activations (M)']*1e6 == pytest.approx(out.numel())

class Odd(nn.Module):
    "Shared weights, a parameter of its own, a matrix product that is no module, a module used twice"
    def __init__(self):
        super().__init__()
        self.scale,self.a,self.b = nn.Parameter(torch.ones(4)),nn.Conv2d(4, 4, 1),nn.Conv2d(4, 4, 1)
        self.b.weight = self.a.weight
    def forward(self, x):
        x = self.a(self.b(self.a(x)))*self.scale[:, None, None]
        return x.flatten(2).transpose(1, 2) @ x.flatten(2)

def test_odd_networks():
    table = analyse(Odd(), 8, channels=4)
    assert table.parameters.to_dict() == {'a':20, 'b':4, '(model)':4, 'total':28}
    assert (table.GMACs*1e9).round().to_dict() == {'a':2*64*16, 'b':64*16, '(model)':64*64*4, 'total':3*64*16 + 64*64*4}
    assert table['conv share']['total'] == pytest.approx(3*64*16/(3*64*16 + 64*64*4))

def test_model_is_left_alone():
    model = higher_hrnet('tiny')
    model.layer1.eval()
    modes,before = [m.training for m in model.modules()],{n: t.clone() for n,t in model.state_dict().items()}
    operations(model, 64)
    assert modes == [m.training for m in model.modules()] and all(t.device.type == 'cpu' for t in model.state_dict().values())
    assert all(t.equal(before[n]) for n,t in model.state_dict().items()) and all(p.grad is None and p.requires_grad for p in model.parameters())

def test_without_anything_to_count():
    assert analyse(nn.ReLU(), 8).loc['total'].drop('conv share').tolist() == [0, 0, 0, 0]

def test_wrong_sizes():
    with pytest.raises(ValueError, match='multiples of 32'): analyse(higher_hrnet('tiny'), 100)
    with pytest.raises(RuntimeError, match='channel'): analyse(higher_hrnet('tiny'), 64, channels=1)

def test_picture():
    import matplotlib; matplotlib.use('Agg')
    ax = show_analysis(analyse(higher_hrnet('tiny'), 64), title='tiny')
    assert ax.get_title() == 'tiny' and 'stage4' in [t.get_text() for t in ax.get_yticklabels()]
