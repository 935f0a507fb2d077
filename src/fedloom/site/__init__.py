"""What runs at a site: the worker that holds model and data, the site's policy, and the record of what left.

How the parts meet:

    SITE.toml ─site.config.load→ SiteConfig          name, model, data, socket, state folder, [policy]
    worker.serve(site)                               one long-lived process; requests come in over a unix socket
      job arrives   → site.policy.check_job(JobFacts)            raises PolicyRefusal
      turn is done  → site.policy.check_update(message, payload, UpdateFacts) → the Message that may leave
                      (the same object where nothing was changed, otherwise it is encoded anew)
      before reply  → audit.keep(site.state, job, round, payload)  the record of everything that left, see site.audit

`PolicyRefusal` is the only error whose text goes to the server as it is. Of any other error the server learns its class;
the whole text stays in the worker's own log.
"""
