"""Setting a federation up across machines: keys and files (`federation`), and what is wrong with them (`doctor`)."""
