"""The mathematics: pairs A and B, and the algebra of Σ B A in factored form."""
