"""What a run or router folder gives to later commands: routers, base model, text, facts."""
