"""What the mediator does, said as plainly as it can be: rules R1 to R29 as a program that is slow and obvious.

Dictionaries, integers and bytes; nothing of the core, no numpy. Nothing is counted that can be looked up: what a guest
holds is worked out from the objects that are there, so there are no books that could be wrong. Each move returns what
comes of it: ("reply", x0..x7), ("forward", x0..x7, page, ticket), ("turn", ticket) where others come first (R23), or
("wait",). Where `page` is one of the mediator's own pages, its address is what stands in a1:a2 of a forward; where a
page names a page list of the mediator's, `page["lists"]` says so, and 0 stands for the address. So no host address
occurs in here at all.

`mediator` is where to begin; `host`, `fast_calls`, `yielding_calls` and `rpc` are its moves, `messages` and `buffers`
what calls are made of, `answers` what comes of a move, `books` who holds what, `terms` the words of all of them.

Flow control is not described; see `mediator.core.flow`.
"""
