import hashlib
import struct

from nbdfleece.backup.content import CHUNK, ContentHash, digest_of, split


def test_ranges_are_cut_at_chunks() -> None:
    assert list(split(CHUNK - 5, CHUNK + 7)) == [
        (CHUNK - 5, 5),
        (CHUNK, CHUNK),
        (2 * CHUNK, 2),
    ]


def test_the_hash_is_what_the_document_says() -> None:
    found = ContentHash(3 * CHUNK)
    found.data(0, 4, digest_of(b"data"))
    found.zero(CHUNK, CHUNK)

    by_hand = hashlib.sha256(struct.pack(">Q", 3 * CHUNK))
    by_hand.update(struct.pack(">QQ", 0, 4) + hashlib.sha256(b"data").digest())
    by_hand.update(struct.pack(">QQ", CHUNK, CHUNK) + bytes(32))
    assert found.hexdigest() == by_hand.hexdigest()


def test_zeroes_told_in_parts_are_the_same_zeroes() -> None:
    one, two = ContentHash(1 << 40), ContentHash(1 << 40)
    one.zero(0, 1 << 30)
    for start in range(0, 1 << 30, 1 << 20):
        two.zero(start, 1 << 20)

    assert one.hexdigest() == two.hexdigest()


def test_zeroes_apart_are_apart() -> None:
    one, two = ContentHash(1 << 40), ContentHash(1 << 40)
    one.zero(0, 20)
    two.zero(0, 10)
    two.data(10, 0, digest_of(b""))
    two.zero(10, 10)

    assert one.hexdigest() != two.hexdigest()
