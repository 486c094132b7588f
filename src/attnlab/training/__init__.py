"""How the companion was made: corpus, tokenizer, training run, baselines and report.

python -m attnlab.training run RUN_FOLDER                  # corpus and tokenizer if missing, then train; resumes after a kill
python -m attnlab.training report RUN_FOLDER --out FOLDER  # evaluate, score heads over time, write the companion
python -m attnlab.training siblings FOLDER --out FOLDER    # the same for models that differ in n_kv_heads alone
"""
