"""`nanollama check-finetuning-data` from a checkout that need not be installed."""

if __name__ == "__main__":
    import checkout

    checkout.run("check-finetuning-data")
