"""One round: a client's turn, the server's turn, and what is checked between them."""
