"""`fedloom attack`: what one who takes part can do to the others, on a testbed.

As a site (`--as site`): some sites of a simulation send forged updates, or train on forged examples. As the server
(`--as server`): what an honest but curious server can read from what the sites send it.

Nothing here can be reached by the settings of a run: only this study makes a site malicious, in its own process.
"""
