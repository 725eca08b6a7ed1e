"""Protocols: the laws of eqs 1-4, and what is not a protocol."""

from itertools import permutations, product

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from perturbprob.experiment.action import Activation, Interference, Knockout, Media, Perturbation, Protocol, Wait

KINDS = (Knockout, Interference, Activation)
genes = st.sampled_from(["NANOG", "SOX2", 'it\'s "odd"', "γ"])
kinds = st.sampled_from(KINDS)
named_media = st.sampled_from(["BMP4", "TGFB1"]).map(Media)
dyadic = st.integers(1, 80).map(lambda eighths: eighths / 8)  # sums of these are exact
waits = dyadic.map(Wait)
edits = st.dictionaries(genes, kinds, max_size=4).map(lambda kind_of: [kind(gene) for gene, kind in kind_of.items()])


def defined(actions):
    """Drop every perturbation of a gene that was perturbed before."""
    seen, kept = set(), []
    for action in actions:
        if isinstance(action, Perturbation):
            if action.gene in seen:
                continue
            seen.add(action.gene)
        kept.append(action)
    return kept


steps = st.one_of(st.builds(lambda kind, gene: kind(gene), kinds, genes), named_media, waits)
lists = st.lists(steps, max_size=8).map(defined)
protocols = st.lists(st.one_of(steps, st.just(Media())), max_size=8).map(defined)  # lists: a Protocol is made in the test itself


# Laws.


@given(lists, genes, lists)
def test_knockout_is_idempotent_at_once_and_later(before, gene, after):
    others = [a for a in before + after if getattr(a, "gene", None) != gene]
    once = Protocol([Knockout(gene), *defined(others)])
    assert once >> Knockout(gene) == once
    assert Protocol([Knockout(gene), Knockout(gene), *defined(others)]) == once


@given(edits, lists)
def test_perturbations_of_different_genes_at_one_instant_commute(instant, after):
    edited = {a.gene for a in instant}
    rest = [a for a in after if getattr(a, "gene", None) not in edited]
    orders = {Protocol([*order, *rest]) for order in permutations(instant)}
    assert len(orders) == 1


@pytest.mark.parametrize(("first", "second"), [pair for pair in product(KINDS, KINDS) if pair != (Knockout, Knockout)])
@given(gene=genes, wait=st.sampled_from([[], [Wait(1)]]))
def test_a_gene_takes_one_perturbation(first, second, gene, wait):
    with pytest.raises(ValueError, match="a gene takes one perturbation"):
        Protocol([first(gene), *wait, second(gene)])


@given(protocols)
def test_the_empty_protocol_and_wait_0_are_identities(actions):
    protocol = Protocol(actions)
    for identity in (Protocol(), Wait(0)):
        assert protocol >> identity == protocol
        assert Protocol() >> identity >> protocol == protocol


@given(protocols)
def test_media_that_the_cells_are_in_already_is_an_identity(actions):
    protocol = Protocol(actions)
    assert protocol >> Media(protocol.media) == protocol
    assert Media() >> protocol == protocol


@given(protocols, dyadic, dyadic)
def test_waits_add_up(actions, first, second):
    protocol = Protocol(actions)
    assert protocol >> Wait(first) >> Wait(second) == protocol >> Wait(first + second)
    assert (protocol >> Wait(first)).time == protocol.time + first


def test_waits_that_are_no_binary_fractions_add_up_to_12_digits():
    assert Wait(0.1) >> Wait(0.2) == Protocol([Wait(0.3)])


@given(protocols, named_media, named_media)
def test_the_last_of_two_media_at_one_instant_holds(actions, first, second):
    protocol = Protocol(actions)
    assert protocol >> first >> second == protocol >> second


@given(protocols, protocols, protocols)
def test_composition_is_associative(first, second, third):
    assume(len(defined(first + second + third)) == len(first + second + third))
    a, b, c = map(Protocol, (first, second, third))
    assert (a >> b) >> c == a >> (b >> c) == Protocol([*first, *second, *third])


def test_a_change_back_to_baseline_media_survives_brackets():
    there, back = Media("BMP4") >> Wait(1), Media() >> Wait(2)
    assert back == Protocol([Wait(2)])
    assert (there >> back).media is None
    assert there >> back == Media("BMP4") >> Wait(1) >> Media() >> Wait(2)


@given(protocols)
def test_simplify_gives_the_normal_form_and_an_equal_protocol(actions):
    protocol = Protocol(actions)
    assert protocol.simplify() == protocol
    assert protocol.simplify().written == protocol.actions


@given(genes, kinds, named_media, waits)
def test_order_matters_once_a_wait_stands_between(gene, kind, media, wait):
    assert kind(gene) >> wait >> media != media >> wait >> kind(gene)
    assert kind(gene) >> wait != wait >> kind(gene)
    assert media >> wait != wait >> media
    assert kind(gene) >> media != media >> kind(gene)


@given(protocols)
def test_repr_and_str_are_read_back(actions):
    protocol = Protocol(actions)
    for text in (repr(protocol), str(protocol)):
        again = Protocol.parse(text)
        assert again == protocol
        assert hash(again) == hash(protocol)


@given(protocols)
def test_normal_form_is_a_fixed_point(actions):
    protocol = Protocol(actions)
    assert Protocol(protocol).actions == protocol.actions


@given(st.data(), protocols)
def test_equal_protocols_hash_equal(data, actions):
    protocol = Protocol(actions)
    padded = list(protocol)
    padded.insert(data.draw(st.integers(0, len(padded))), Wait(0))
    assert Protocol(padded) == protocol
    assert hash(Protocol(padded)) == hash(protocol)


@given(protocols)
def test_segments_hold_the_whole_protocol_in_order(actions):
    protocol = Protocol(actions)
    cut = protocol.segments()
    assert Protocol(step for instant, wait in cut for step in (*instant, Wait(wait))) == protocol
    assert sum(wait for _, wait in cut) == protocol.time
    assert all(wait > 0 for _, wait in cut[:-1])


@given(protocols, st.sampled_from(["BMP4", "TGFB1", "other", None]))
def test_the_baseline_media_has_no_name_in_a_protocol(actions, baseline):
    protocol = Protocol(actions)
    understood = protocol.with_baseline(baseline)
    assert all(a.name != baseline or baseline is None for a in understood if isinstance(a, Media))
    assert understood.with_baseline(baseline) == understood
    assert understood.time == protocol.time


def test_names_of_a_protocol():
    protocol = Knockout("SOX2") >> Knockout("MYC") >> Media("BMP4") >> Wait(2) >> Activation("KLF4") >> Wait(1)
    assert (protocol.perturbation, protocol.media, protocol.time) == ("KLF4+MYC+SOX2", "BMP4", 3.0)
    assert (Protocol().perturbation, Protocol().media, Protocol().time) == ("control", None, 0.0)
    assert [kind("G").symbol for kind in KINDS] == ["×", "↓", "↑"]


# Misuse.


@pytest.mark.parametrize("gene", ["", " "])
@pytest.mark.parametrize("kind", KINDS)
def test_a_perturbation_needs_a_gene(kind, gene):
    with pytest.raises(ValueError, match="needs the name of a gene"):
        kind(gene)


def test_a_perturbation_has_a_kind():
    with pytest.raises(TypeError, match="use Knockout, Interference or Activation"):
        Perturbation("NANOG")


@pytest.mark.parametrize("time", [-1, -0.5, float("nan"), float("inf")])
def test_time_runs_forward(time):
    with pytest.raises(ValueError, match="finite time of at least 0"):
        Wait(time)


def test_a_truth_value_is_no_time():
    with pytest.raises(TypeError, match="Wait needs a number"):
        Wait(True)


@pytest.mark.parametrize(
    "text", ["", "Knockout(", "Knockout()", "Knockdown('A')", "Wait('2')", "Knockout(gene='A')", "Wait(1) + Wait(2)", "__import__('os')"]
)
def test_other_text_is_no_protocol(text):
    with pytest.raises(ValueError, match=r"Cannot read .* as a protocol. Write it like Knockout"):
        Protocol.parse(text)


@pytest.mark.parametrize("text", ["Knockout(A) >> Wait(5)", "Wait(1+1)", "Knockout('A') + Wait(1)", "exit()", "", "Knockout('A'"])
def test_what_is_not_a_protocol_says_how_to_write_one(text):
    with pytest.raises(ValueError, match=r"Cannot read .* as a protocol\. Write it like"):
        Protocol.parse(text)


def test_control_is_no_gene_and_a_media_has_a_name():
    with pytest.raises(ValueError, match=r"Control is no gene: .* without a perturbation: Wait\(5\)"):
        Knockout("control")
    with pytest.raises(ValueError, match=r"the baseline media is Media\(\)"):
        Media(" ")
