"""Arrays that cover all pairs of techniques."""

from itertools import combinations, permutations

from contract.covering import covering_array, relations_shown


def test_an_array_gives_each_slot_one_owner():
    owners = {"order": ["a", "b", "c"], "batch": ["c", "d"]}
    runs = covering_array(owners, ["e", "f"], seed=3)
    for names in runs:
        assert len(set(names)) == len(names)
        assert all(len(set(names) & set(several)) <= 1 for several in owners.values())
    assert {frozenset(pair) for names in runs for pair in combinations(names, 2)} == {
        frozenset(pair) for pair in combinations("abcdef", 2) if set(pair) not in ({*"ab"}, {*"ac"}, {*"bc"}, {*"cd"})
    }


def test_an_array_shows_what_is_asked_and_no_more_than_is_not_given():
    names = list("abcdef")
    both = covering_array({}, names)
    pairs = set(permutations(names, 2))
    assert relations_shown(both, names) == {(a, r, b) for a, b in pairs for r in ("before", "with", "without")}
    together = covering_array({}, names, relations=lambda a, b: ["with"])
    assert len(together) == 1 and sorted(together[0]) == names
    assert covering_array({}, names, given=both) == []
