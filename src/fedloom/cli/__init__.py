"""What a terminal sees: arguments in, calls into the library, tables out."""
