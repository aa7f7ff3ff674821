"""What commands share.

cli (flags, errors, exit statuses), config_file (reading, overriding); model_flags, conversation, harness_task,
mmlu_task; versions (what a measurement ran on); embedded/ (the quickstart's corpus, instructions and tokenizer).
"""
