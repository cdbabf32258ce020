"Pictures: every joint and limb where it belongs, of the right colour and kind"
import matplotlib
matplotlib.use('Agg')
import matplotlib.pyplot as plt, numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from posenb.show import draw_poses, image_grid, palette, show_image, show_maps, show_poses
from posenb.skeleton import COCO, CROWDPOSE

@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close('all')

def people(n, skeleton=COCO, size=100, seed=0):
    xy = np.random.default_rng(seed).uniform(5, size-5, (n, skeleton.n, 2))
    return np.concatenate([xy, np.ones((n, skeleton.n, 1))], -1)

blank = np.full((100, 120, 3), 40, np.uint8)

def test_an_image_is_shown_as_it_is():
    for given in (blank, blank/255, torch.from_numpy(blank).permute(2, 0, 1)):
        ax = show_image(given, title='t')
        assert ax.images[0].get_array().shape == (100, 120, 3) and ax.get_title() == 't'
        assert tuple(ax.images[0].get_extent()) == (-.5, 119.5, 99.5, -.5)

@pytest.mark.parametrize('skeleton', [COCO, CROWDPOSE])
def test_limbs_of_people(skeleton):
    "Joints above the threshold, edges with both ends, right ones dashed, one colour a person"
    poses = people(2, skeleton)
    a,b = skeleton.edges[0]
    poses[1, a, 2] = .2
    ax = show_poses(blank, poses, skeleton, threshold=.5)
    edges = [(p, *e) for p in range(2) for e in skeleton.edges if not (p and a in e)]
    assert len(ax.lines) == len(edges)
    for line,(p,i,j) in zip(ax.lines, edges):
        np.testing.assert_allclose(line.get_xydata(), poses[p, [i, j], :2])
        assert np.allclose(line.get_color(), palette(2)[p]/255)
        assert (line.get_linestyle() != '-') == any('right' in skeleton.names[k] for k in (i, j))
    np.testing.assert_allclose(ax.collections[0].get_offsets(), poses[0, :, :2])
    assert len(ax.collections[1].get_offsets()) == skeleton.n - 1

def test_nobody_is_drawn_as_nothing():
    for nobody in (np.zeros((0, 17, 3)), [], torch.zeros(0, 17, 3)):
        assert (draw_poses(blank, nobody) == blank).all() and not show_poses(blank, nobody).lines

@settings(max_examples=30, deadline=None)
@given(x=st.floats(10, 100), y=st.floats(10, 90), scale=st.sampled_from([1, 2, 3]))
def test_a_drawn_joint_lies_where_it_is(x, y, scale):
    pose = np.zeros((1, 17, 3))
    pose[0, 3] = x, y, 1
    drawn = draw_poses(blank, pose, scale=scale)
    assert drawn.shape == (100*scale, 120*scale, 3) and (blank == 40).all()
    changed = np.abs(drawn - 40.).sum(-1)                    # the rim is drawn in part
    centre = np.array([(changed*at).sum() for at in np.indices(changed.shape)[::-1]])/changed.sum()
    assert np.abs((centre + .5)/scale - .5 - (x, y)).max() < .25/scale      # a quarter pixel of the picture: .21 is the worst that OpenCV's circles do
    assert (drawn == palette(1)[0]).all(-1).any()

def test_colours_of_neighbours_are_far_apart():
    colours = palette(30).astype(int)
    assert len({*map(tuple, colours)}) == 30 and np.abs(np.diff(colours, axis=0)).max(1).min() > 60

def test_maps_cover_the_image():
    maps = torch.zeros(3, 25, 30)
    maps[1, 4, 7],maps[2, 20, 3] = .5,1.
    ax = show_maps(maps, blank)
    assert ax.images[1].get_extent() == ax.images[0].get_extent()
    assert (ax.images[1].get_array() == maps.amax(0).numpy()).all()
    assert show_maps(maps).images[0].get_clim() == (0, 1) and show_maps(maps*0).images[0].get_clim()[1] > 0

@settings(max_examples=20, deadline=None)
@given(n=st.integers(1, 9), columns=st.integers(1, 5))
def test_a_grid_has_as_many_axes_as_pictures(n, columns):
    axes = image_grid(n, columns)
    places = {tuple(ax.get_subplotspec().get_geometry()[:2]) for ax in axes}
    assert len(axes) == n and places == {(-(-n//min(n, columns)), min(n, columns))}
    plt.close('all')
