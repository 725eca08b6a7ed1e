"""The names a model knows: protocols as tensors and back, and names that it has never seen."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from perturbprob.experiment.action import Activation, Interference, Knockout, Media, Protocol, Wait
from perturbprob.experiment.simulate import simulate
from perturbprob.experiment.vocabulary import Vocabulary, nearest

NANOG, SOX2, KLF4 = Knockout("NANOG"), Activation("SOX2"), Interference("KLF4")
KNOWN = Vocabulary(
    genes=("GATA6", "KLF4", "NANOG", "SOX2"),
    perturbations=(KLF4, NANOG, SOX2),
    media=("BMP4", "TGFB1"),
    batches=("lane1", "lane2"),
    baseline="mTeSR",
    time_unit="day",
    time_scale=2.0,
)
names = st.text(min_size=1, max_size=12).filter(lambda name: name.strip() and name != "control")


def segments(*protocols):
    """Each segment as plain lists: perturbation, media, changed, wait."""
    cut = KNOWN.encode([Protocol() >> protocol for protocol in protocols])
    return [tuple(part.tolist() for part in (s.perturbation, s.media, s.changed, s.wait)) for s in cut]


# Laws.


def test_a_protocol_of_one_instant_and_a_wait_is_one_segment():
    assert segments(NANOG >> Media("TGFB1") >> Wait(3)) == [([[0.0, 1.0, 0.0]], [[0.0, 1.0]], [True], [1.5])]


def test_the_order_within_an_instant_does_not_show():
    assert segments(NANOG >> Media("BMP4") >> SOX2 >> Wait(1)) == segments(SOX2 >> Media("BMP4") >> NANOG >> Wait(1))


def test_each_wait_ends_a_segment_and_shorter_protocols_wait_no_time_at_their_end():
    first, second, third = segments(NANOG >> Wait(1) >> Media("BMP4") >> Wait(4) >> Media(), SOX2 >> Wait(2), Protocol())
    assert first == ([[0, 1, 0], [0, 0, 1], [0, 0, 0]], [[0, 0]] * 3, [False] * 3, [0.5, 1.0, 0.0])
    assert second == ([[0, 0, 0]] * 3, [[1, 0], [0, 0], [0, 0]], [True, False, False], [2.0, 0.0, 0.0])
    assert third == ([[0, 0, 0]] * 3, [[0, 0]] * 3, [True, False, False], [0.0, 0.0, 0.0])


def test_the_baseline_media_is_no_media_by_name_or_without():
    named = NANOG >> Media("mTeSR") >> Wait(2)
    assert KNOWN.protocol(named) == NANOG >> Wait(2)
    assert segments(named) == segments(NANOG >> Wait(2)) == [([[0.0, 1.0, 0.0]], [[0.0, 0.0]], [False], [1.0])]
    assert segments(Media("BMP4") >> Wait(2) >> Media("mTeSR"))[1] == ([[0.0] * 3], [[0.0] * 2], [True], [0.0])


def test_an_action_alone_is_a_protocol():
    assert KNOWN.protocol(NANOG) == Protocol([NANOG])


def test_cells_of_a_segment_are_taken_by_index_and_moved_together():
    segment = KNOWN.encode([NANOG >> Wait(1), SOX2 >> Media("BMP4") >> Wait(2)])[0]
    cells = segment[torch.tensor([1, 0, 1])]
    assert cells.perturbation.tolist() == [[0, 0, 1], [0, 1, 0], [0, 0, 1]]
    assert cells.media.tolist() == [[1, 0], [0, 0], [1, 0]]
    assert (cells.changed.tolist(), cells.wait.tolist()) == ([True, False, True], [1.0, 0.5, 1.0])
    moved = cells.to(torch.device("meta"))
    assert {part.device.type for part in (moved.perturbation, moved.media, moved.changed, moved.wait)} == {"meta"}


def test_a_vocabulary_holds_every_name_of_its_screen_and_the_median_wait_of_its_cells():
    screen = simulate(n_cells=90, n_genes=12, n_perturbations=3, media=("mTeSR", "BMP4", "A83"), times=(1.0, 2.0, 5.0), n_batches=2).screen
    vocabulary = Vocabulary.of(screen)
    assert vocabulary.genes == screen.genes
    assert tuple(a.gene for a in vocabulary.perturbations) == screen.perturbations
    assert vocabulary.media == ("A83", "BMP4")
    assert (vocabulary.baseline, vocabulary.batches, vocabulary.time_unit) == ("mTeSR", screen.batches, None)
    assert vocabulary.time_scale == 2.0
    time = np.array([p.time for p in screen.conditions])[screen.condition]
    assert Vocabulary.of(screen[time == 5]).time_scale == 5.0
    assert Vocabulary.of(screen[(time == 5) | (np.arange(90) < 20)]).time_scale == 5.0  # of cells, not of conditions
    for protocol in screen.conditions:
        assert vocabulary.protocol(protocol) == protocol
    assert {segment.wait.max().item() for segment in vocabulary.encode(screen.conditions)} == {2.5}


def test_a_screen_at_time_0_keeps_its_unit_of_time():
    assert Vocabulary.of(simulate(n_cells=20, n_perturbations=1, times=(0.0,), n_batches=1).screen).time_scale == 1.0


@given(
    st.lists(names, max_size=3, unique=True),
    st.lists(names, max_size=3, unique=True),
    st.sampled_from([Knockout, Interference, Activation]),
)
def test_json_and_back_is_the_same_vocabulary(genes, media, kind):
    vocabulary = Vocabulary(tuple(genes), tuple(map(kind, genes)), tuple(media), ("b",), baseline=None, time_unit="h", time_scale=0.3)
    assert Vocabulary.from_json(json.loads(json.dumps(vocabulary.to_json()))) == vocabulary


def test_json_keeps_every_kind_of_perturbation_the_baseline_and_the_time_scale():
    again = Vocabulary.from_json(json.loads(json.dumps(KNOWN.to_json())))
    assert again == KNOWN
    assert [type(a) for a in again.perturbations] == [Interference, Knockout, Activation]


# Misuse.


@pytest.mark.parametrize(
    ("protocol", "said"),
    [
        (Knockout("NANOGG") >> Wait(1), r"Knockout\('NANOGG'\) was never seen by this model, .* Did you mean 'NANOG'\?"),
        (Knockout("SOX2") >> Wait(1), r"Knockout\('SOX2'\) was never seen .* It has seen Activation\('SOX2'\)\."),
        (Knockout("xyz") >> Wait(1), r"Knockout\('xyz'\) was never seen .* Known: KLF4, NANOG, SOX2\."),
        (NANOG >> Media("BMP5") >> Wait(1), r"Media 'BMP5' was never seen by this model\. Did you mean 'BMP4'"),
        (Wait(1) >> Media("mTesR"), r"Media 'mTesR' was never seen by this model\. Did you mean 'mTeSR'"),
    ],
    ids=str,
)
def test_a_name_never_seen_is_refused_with_the_nearest(protocol, said):
    for refuse in (KNOWN.protocol, lambda p: KNOWN.encode([Protocol(), p])):
        with pytest.raises(ValueError, match=said):
            refuse(protocol)


def test_a_model_without_media_or_perturbations_says_that_there_is_none():
    bare = Vocabulary(genes=("A",), perturbations=(), media=(), batches=("batch",))
    with pytest.raises(ValueError, match=r"Media 'BMP4' was never seen by this model\. There is none\."):
        bare.protocol(Media("BMP4"))
    with pytest.raises(ValueError, match=r"Knockout\('A'\) was never seen by this model.* There is none\."):
        bare.protocol(Knockout("A"))


def test_a_batch_never_seen_is_refused_with_the_nearest():
    assert KNOWN.batch_code("lane2") == 1
    with pytest.raises(ValueError, match=r"Batch 'lane3' was never seen by this model\. Did you mean 'lane"):
        KNOWN.batch_code("lane3")


def test_nearest_looks_past_case_first():
    assert nearest("PRTN3", ["Prtn3", "PRTN2"]) == "Did you mean 'Prtn3'?"
    assert nearest("prdm14", ["PRDM14", "prdm1"]) == "Did you mean 'PRDM14'?"


def test_nearest_lists_what_is_known_where_nothing_is_near():
    assert nearest("zzz", [f"name{k}" for k in range(10)]).endswith("name7 and 2 more.")
    assert nearest("zzz", ["b", "a", "b"]) == "Known: a, b."
    assert nearest("zzz", []) == "There is none."
