"Votes: blind, kept, ranked; the page in plain HTML and the widget without a kernel."
import base64
import json
import re
from collections import Counter

import numpy as np
import pytest

import loramix
from loramix import votes
from loramix.sweeps import Sweep, sweep
from loramix.votes import Vote, add_vote, bradley_terry, make_ballot, rank, read_page_votes, read_votes, vote, vote_page


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Sweep:
    "A small real sweep: two methods, two pairs, two seeds, two steps."
    return sweep(["subject", "direct"], [("robot", "line"), ("swan", "night")], 2, store=tmp_path_factory.mktemp("votes")/"bench.sqlite", run=dict(num_inference_steps=2), progress=False)


def test_ballot_is_balanced_and_seeded():
    pairs = [("robot", "line"), ("swan", "night"), ("crab", "stamp")]
    ballot = make_ballot("abcd", pairs, range(3), 600, seed=1)
    meetings = Counter(frozenset((q.left, q.right)) for q in ballot)
    assert len(meetings) == 6 and max(meetings.values()) - min(meetings.values()) <= 1
    assert abs(sum(q.left < q.right for q in ballot) - 300) < 60                       # sides by lot
    assert ballot == make_ballot("abcd", pairs, range(3), 600, seed=1) != make_ballot("abcd", pairs, range(3), 600, seed=2)


def test_votes_survive_and_the_last_counts(tmp_path):
    path = tmp_path/"votes.jsonl"
    for choice in ("left", "tie", "right"): add_vote(path, Vote("robot", "line", 0, "a", "b", choice, "x"))
    add_vote(path, Vote("robot", "line", 0, "b", "a", "left", "x"))                     # the same question, sides changed
    add_vote(path, Vote("robot", "line", 0, "a", "b", "tie", "y"))
    assert [(v.left, v.choice) for v in read_votes(path)] == [("b", "left"), ("a", "tie")]
    path.write_text(path.read_text() + "{broken\n")
    with pytest.raises(ValueError, match="Line 6"): read_votes(path)


def test_bradley_terry_against_another_solver():
    "Logistic regression on signed indicators, by Newton's method in float64."
    rng = np.random.default_rng(0)
    left, right = rng.integers(0, 5, 400), rng.integers(0, 5, 400)
    keep = left != right
    left, right = left[keep], right[keep]
    truth = np.array([1.2, .4, 0, -.5, -1.1])
    won = (rng.random(len(left)) < 1/(1 + np.exp(truth[right] - truth[left]))).astype(float)
    X = np.zeros((len(left), 5))
    X[np.arange(len(left)), left], X[np.arange(len(left)), right] = 1, -1
    s = np.zeros(5)
    for _ in range(50):
        p = 1/(1 + np.exp(-X @ s))
        s += np.linalg.pinv(X.T*(p*(1 - p)) @ X) @ X.T @ (won - p)
    found = bradley_terry(left, right, won, pull=1e-9)
    assert np.allclose(found, s - s.mean(), atol=1e-5) and np.abs(found - truth).max() < .6
    assert np.allclose(bradley_terry(left, right, won, np.full(len(won), 3.), pull=3e-9), found, atol=1e-5)


def test_rank_finds_the_better_one_and_says_how_sure():
    rng = np.random.default_rng(1)
    names = dict(good=.9, bad=-.9)
    cast = [Vote(q.subject, q.style, q.seed, q.left, q.right, "left" if rng.random() < 1/(1 + np.exp(names[q.right] - names[q.left])) else "right")
            for q in make_ballot(names, [(f"s{i}", f"t{j}") for i in range(5) for j in range(4)], range(5), 200)]
    table = rank(cast, draws=200)
    assert list(table.index) == ["good", "bad"] and table.loc["good", "strength_low"] > 0 > table.loc["bad", "strength_high"]
    assert table.wins.sum() == 200
    with pytest.raises(ValueError, match="no votes"): rank([])


def test_page_is_blind_loads_nothing_and_comes_back(made, tmp_path):
    key = vote_page(made, tmp_path/"vote.html", count=8)
    page = (tmp_path/"vote.html").read_text()
    assert "direct" not in page and not re.search(r'(src|href)="http', page)
    shown = json.loads(re.search(r"questions = (\[.*?\]), store", page).group(1))
    ballot = json.loads(key.read_text())["ballot"]
    import io
    from PIL import Image
    for question, known in zip(shown, ballot):
        for side in ("left", "right"):
            png = base64.b64decode(question[side][0].split(",")[1])
            assert b"tEXt" not in png and b"iTXt" not in png and b"loramix" not in png
            assert np.array_equal(np.array(Image.open(io.BytesIO(png))), np.array(made.picture(known[side], known["subject"], known["style"], known["seed"])))
    saved = dict(kind="loramix page votes", page=json.loads(key.read_text())["page"], voter="me", votes={"0": dict(choice="left", time=1.), "3": dict(choice="tie", time=2.)})
    (tmp_path/"mine.json").write_text(json.dumps(saved))
    cast = read_page_votes(key, tmp_path/"mine.json")
    assert [(v.left, v.choice, v.voter) for v in cast] == [(ballot[0]["left"], "left", "me"), (ballot[3]["left"], "tie", "me")]
    (tmp_path/"other.json").write_text(json.dumps(saved | dict(page="another")))
    with pytest.raises(ValueError, match="does not belong"): read_page_votes(key, tmp_path/"other.json")


def test_widget_writes_every_click_and_goes_on_where_it_was(made, tmp_path):
    path = tmp_path/"votes.jsonl"
    box = vote(made, path, count=4, voter="x")
    first = box.question
    for secret in ("subject LoRA", "direct"): assert secret not in box.heading.value + box.shown.value
    box.buttons["left"].click()
    assert [v.choice for v in read_votes(path)] == ["left"] and box.question != first and "Question 2" in box.heading.value
    again = vote(made, path, count=4, voter="x")
    assert again.question == box.question
    while again.question: again.buttons["tie"].click()
    assert "Thank you" in again.heading.value and all(b.disabled for b in again.buttons.values()) and len(read_votes(path)) == 4
    assert vote(made, path, count=4, voter="y").question == first


def test_agreement_is_one_for_a_metric_that_voted(made):
    cast = []
    for q in make_ballot([m.title for m in made.methods], made.pairs, made.seeds, 8):
        value = lambda side: made.frame.set_index(["method", "subject", "style", "seed"]).loc[(side, q.subject, q.style, q.seed), "p_subject"]
        cast.append(Vote(q.subject, q.style, q.seed, q.left, q.right, "left" if value(q.left) > value(q.right) else "right"))
    table = votes.agreement(cast, made.frame, ["p_subject", "-p_subject"], draws=100)
    assert table.loc["p_subject", "agreement"] == 1 and table.loc["-p_subject", "agreement"] == 0
