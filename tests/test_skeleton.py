"Skeletons of any names, pairs and orders: valid ones are consistent, broken ones are refused with the reason"
import numpy as np, pytest
from hypothesis import assume, given, settings, strategies as st
from posenb.skeleton import COCO, CROWDPOSE, Skeleton

relaxed = settings(deadline=None)

names = st.lists(st.text(st.characters(codec='utf-8'), min_size=1, max_size=8), min_size=1, max_size=24, unique=True)

@st.composite
def bodies(draw):
    "Arguments of `Skeleton` that fit together; joints by name or by index"
    n = len(called := draw(names))
    joint = lambda i: draw(st.sampled_from([i, called[i]]))
    shuffled = draw(st.permutations(range(n)))
    pairs = [(joint(a), joint(b)) for a,b in zip(shuffled[:draw(st.integers(0, n//2))], shuffled[n//2:])]
    edges = [(joint(a), joint(b)) for a,b in draw(st.lists(st.tuples(*[st.integers(0, n-1)]*2), max_size=8))]
    sigmas = draw(st.lists(st.floats(1e-3, 1), min_size=n, max_size=n))
    order = draw(st.one_of(st.none(), st.permutations([joint(i) for i in range(n)])))
    return dict(names=called, flip_pairs=pairs, edges=edges, sigmas=sigmas, order=order)

@relaxed
@given(bodies())
def test_a_valid_skeleton_is_consistent(body):
    s = Skeleton(**body)
    index = lambda j: body['names'].index(j) if isinstance(j, str) else j
    assert s.n == len(s.names) == len(s.sigmas) == len(s.order) and s.names == tuple(body['names'])
    assert sorted(s.flip_index) == sorted(s.order) == list(range(s.n))
    assert (s.flip_index[s.flip_index] == np.arange(s.n)).all()
    assert (s.flip_index != np.arange(s.n)).sum() == 2*len(body['flip_pairs'])
    for a,b in body['flip_pairs']: assert s.flip_index[index(a)] == index(b)
    assert s.edges == tuple((index(a), index(b)) for a,b in body['edges'])
    assert s.order.tolist() == ([*range(s.n)] if body['order'] is None else [index(j) for j in body['order']])

@relaxed
@given(bodies())
def test_equal_to_its_copy_and_to_what_it_prints(body):
    s = Skeleton(**body)
    for copy in (Skeleton(**body), Skeleton(s.names, s.flip_pairs, s.edges, s.sigmas, s.order), eval(repr(s), dict(Skeleton=Skeleton))):
        assert copy == s and hash(copy) == hash(s)
    assert Skeleton(s.names, s.flip_pairs, s.edges, s.sigmas*2, s.order) != s

@relaxed
@given(bodies(), st.data())
def test_a_broken_one_is_refused_with_the_reason(body, data):
    n,draw = len(body['names']),lambda *choices: data.draw(st.sampled_from(choices))
    joint = data.draw(st.integers(0, n-1))
    stranger = draw(n, n+5, -1, 'no such joint')
    what = f'no joint is named|there is no joint {stranger};'
    broken,message = draw(
        (dict(names=[*body['names'], body['names'][joint]]), 'names: .* stands there 2 times'),
        (dict(names=[], flip_pairs=[], edges=[], sigmas=[], order=None), 'at least one joint'),
        (dict(flip_pairs=[(joint, stranger)]), f'flip_pairs: ({what})'),
        (dict(edges=[*body['edges'], (stranger, joint)]), f'edges: ({what})'),
        (dict(order=[stranger]*n), f'order: ({what})'),
        (dict(order=[*range(n), joint]), f'order: must name each of the {n} joints once'),
        (dict(order=[*range(n-1)]), f'order: must name each of the {n} joints once'),
        (dict(flip_pairs=[*body['flip_pairs'], (joint, joint)]), 'flip_pairs: .* a joint has one mirror image'),
        (dict(flip_pairs=[(joint,)]), 'flip_pairs: .* is not a pair of joints'),
        (dict(edges=['ab']), "edges: 'ab' is not a pair of joints"),
        (dict(sigmas=[*body['sigmas'], .1]), f'sigmas: {n} positive numbers'),
        (dict(sigmas=[draw(0, -.1, float('nan')), *body['sigmas'][1:]]), f'sigmas: {n} positive numbers'))
    assume('no such joint' not in body['names'])
    with pytest.raises(ValueError, match=f'(?s){message}'): Skeleton(**{**body, **broken})

parts = st.lists(st.sampled_from('shoulder elbow wrist hip knee ankle ear eye paw wing heel collar'.split()), min_size=1, max_size=8, unique=True)
spellings = [('left_{}', 'right_{}'), ('{}_right', '{}_left'), ('l_{}', 'r_{}'), ('{}_L', '{}_R'), ('l{}', 'r{}'), ('{}L', '{}R'), ('{}-l', '{}-r'), ('R-{}', 'L-{}'),
             ('L.{}', 'R.{}'), ('Left {}', 'Right {}'), ('front_l_{}', 'front_r_{}')]

@relaxed
@given(parts, st.sampled_from(spellings), st.data())
def test_mirror_pairs_in_any_spelling_and_order(parts, spelling, data):
    "Each part is its partner's mirror image; what has no partner is its own"
    pairs = [[side.format(p) for side in spelling] for p in parts]
    called = data.draw(st.permutations([*sum(pairs, []), 'nose', 'lip', 'tail', spelling[0].format('fin')]))
    s = Skeleton.from_coco(dict(keypoints=called))
    assert {frozenset(s.names[j] for j in p) for p in s.flip_pairs} == {*map(frozenset, pairs)}

@relaxed
@given(names, st.data())
def test_any_category_has_a_skeleton(names, data):
    n = len(names)
    edges = data.draw(st.lists(st.tuples(*[st.integers(1, n)]*2), max_size=5))
    s = Skeleton.from_coco(dict(keypoints=names, skeleton=data.draw(st.sampled_from([edges, None]))))
    assert s.names == tuple(names) and (s.flip_index[s.flip_index] == np.arange(n)).all()

def test_known_skeletons_are_found_by_their_names():
    for known in (COCO, CROWDPOSE):
        assert Skeleton.from_coco(dict(keypoints=list(known.names))) is known
        own = Skeleton.from_coco(dict(keypoints=list(known.names[::-1])))
        assert own != known and [own.names[i] for i in own.flip_index[::-1]] == [known.names[i] for i in known.flip_index]
        assert own.sigmas.tolist() == known.sigmas[::-1].tolist()
