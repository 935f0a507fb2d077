"""What runs at a site: the worker that holds model and data, the site's policy, and the record of what left.

How the parts meet in one turn (site.turns):

    SITE.toml ─site.config.load→ SiteConfig: name, model, data, socket, state folder, [policy]
    policy.check_job       before training
    policy.guarded         around the training step
    policy.check_update    before a payload leaves
    audit.AuditTrail       in the folder <state>/audit: what left the site, written before the reply is sent
    policy.told_to_server  what the server learns of an error
"""
