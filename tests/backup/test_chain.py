from nbdfleece.backup.chain import lineage, next_merge, restorable, useless
from nbdfleece.backup.manifest import Manifest, Point
from nbdfleece.backup.names import Kind


def chain(*parents: int | None) -> Manifest:
    """Points 0, 1, ... standing upon the given ones."""
    points = tuple(
        Point(
            f"2026110{number + 1}T000000Z",
            "2026-11-01T00:00:00Z",
            Kind.FULL if parent is None else Kind.INCREMENT,
            None if parent is None else f"2026110{parent + 1}T000000Z",
            1,
            1,
            "",
        )
        for number, parent in enumerate(parents)
    )
    return Manifest("vda", "", points)


def numbers(points) -> list[int]:
    return [int(getattr(point, "name", point)[6:8]) - 1 for point in points]


def kept(manifest: Manifest, *which: int) -> set[str]:
    return {manifest.points[number].name for number in which}


def test_a_point_is_made_of_its_parents_down_to_the_full_one() -> None:
    found = chain(None, 0, 1, None, 3)

    assert numbers(lineage(found, found.points[2])) == [0, 1, 2]
    assert numbers(lineage(found, found.points[4])) == [3, 4]


def test_a_missing_file_costs_the_points_above_it_and_no_others() -> None:
    found = chain(None, 0, 1, None, 3)
    present = {point.file for point in found.points} - {found.points[1].file}

    assert numbers(restorable(found, present)) == [0, 3, 4]


def test_the_oldest_increments_go_into_the_full_file() -> None:
    found = chain(None, 0, 1, 2, 3)

    merge = next_merge(found, kept(found, 2, 3, 4))

    assert merge is not None
    assert numbers(merge.parts) == [0, 1, 2]
    assert merge.parent is None
    assert merge.kind is Kind.FULL


def test_increments_in_the_middle_become_one() -> None:
    found = chain(None, 0, 1, 2)

    merge = next_merge(found, kept(found, 0, 3))

    assert merge is not None
    assert numbers(merge.parts) == [1, 2, 3]
    assert merge.parent == found.points[0].name
    assert merge.kind is Kind.INCREMENT


def test_what_is_kept_as_it_is_needs_no_merge() -> None:
    found = chain(None, 0, 1, None)

    assert next_merge(found, kept(found, 0, 1, 2, 3)) is None


def test_points_that_no_kept_one_needs_go_from_the_newest_on() -> None:
    found = chain(None, 0, 1, None, 3)

    assert numbers(useless(found, kept(found, 4))) == [2, 1, 0]
    assert numbers(useless(found, kept(found, 1, 4))) == [2]
