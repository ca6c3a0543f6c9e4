"""One save: what each rank writes, copied or not, staged, committed."""
