"""The soak: a federation of many sites and rounds, with a fault in every round, and what must hold at its end.

    faults ─ armed, one a round ─→ federation (server, nodes, desks, over a link that tests can cut)
                                        │ ledger, sites' records, what the link carried
    replay ─ same attendance, undisturbed ─→ checks ─→ report

`play` holds the federation of one process: the server's rounds and the sites' desks are the real ones, while Flower's
transport and the training step are made up and time is simulated, so that hundreds of rounds take minutes.
`processes` plays a smaller one with a real SuperLink, real nodes and real workers.
"""
