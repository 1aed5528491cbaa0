"""The study: the baseline plus one design choice at a time, over models, tasks and seeds, and what each choice adds."""
