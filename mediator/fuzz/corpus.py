"""What episodes are made of: recorded calls, drawn moves, and what has shown something new."""

from collections.abc import Sequence
from random import Random
from typing import Final

from mediator.fuzz.moves import Move, as_recorded, changed, draw
from mediator.fuzz.seeds import Conversation

EPISODE: Final = 400
"""Drawn moves from the birth of the guests to their end."""
BEGUN: Final = 0.3
"""How often a guest begins an episode as one that showed something new did."""
LATEST: Final = 8
"""Of all that was kept, the last ones are begun from as often as all others: they lead the farthest."""
RECORDED: Final = 0.01
"""How often the next move is the first one of a recorded call."""


class Corpus:
    """Draws episodes. What was kept is begun from again."""

    def __init__(self, choose: Random, guests: int, recorded: Sequence[Conversation]) -> None:
        self._choose = choose
        self._guests = guests
        self._seeds = recorded
        self._kept: list[list[Move]] = []

    def keep(self, moves: list[Move]) -> None:
        """Keep moves of which the last one showed something new: those of its guest, who knows nothing of others."""
        guest = moves[-1].guest
        self._kept.append([move for move in moves if move.guest == guest])

    def episode(self) -> list[Move]:
        """Draw an episode. Some guests begin as one did that showed something new, with a change here and there."""
        choose, guests = self._choose, self._guests
        begun = [self._begin(guest) for guest in range(guests) if self._kept and choose.random() < BEGUN]
        moves: list[Move] = []
        while begun:
            moves.append(choose.choice(begun).pop(0))
            begun = [some for some in begun if some]
        end = len(moves) + EPISODE
        while len(moves) < end:
            if self._seeds and choose.random() < RECORDED:
                moves += self._recorded()
            else:
                moves.append(draw(choose, guests))
        return moves

    def _begin(self, guest: int) -> list[Move]:
        """Something that was kept, for this guest."""
        choose = self._choose
        kept = choose.choice(self._kept[-LATEST:] if choose.random() < 0.5 else self._kept)
        moves = [move._replace(guest=guest) for move in kept]
        if choose.random() < 0.5:
            at = choose.randrange(len(moves))
            moves[at] = changed(choose, moves[at])
        return moves

    def _recorded(self) -> list[Move]:
        """One recorded call as a guest makes it; half of the time with something changed."""
        choose = self._choose
        guest = choose.randrange(self._guests)
        moves = [as_recorded(choose, exchange, guest) for exchange in choose.choice(self._seeds)]
        if choose.random() < 0.5:
            at = choose.randrange(len(moves))
            moves[at] = changed(choose, moves[at])
        return moves
