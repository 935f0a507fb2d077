"""What runs at a site: the worker that holds model and data, the site's policy, and the record of what left.

How the parts meet:

    SITE.toml ─config.load_site_config→ SiteConfig   name, model, data, socket, state folder, [policy]
    worker.serve_site(site)                          one long-lived process; requests come in over a unix socket
      door.Door     → callers that have shown the token, one after another
      job arrives   → trail = audit.AuditTrail(site.state / "audit")      one record a site, for all its jobs
                      policy.check_settings(site.policy, config, site.name, round)      before a model is loaded
                      policy.check_job(site.policy, method, modules, examples, draws)   before anything is written
      before a turn → policy.check_spending(site.policy, trail.count_spent(job, round))
      training      → rounds.client_turn(…, policy.guard_training(site.policy, train, method.trainable, charge), round)
                      clipped and noised before the method selects or keeps anything: noise cannot be added later
                      charge = trail.charge(job, round, mu) has it on disk that noise is about to be drawn
      turn is done  → policy.check_may_leave(site.policy, payload, state.adapter, trail.count_spent(job, round), parts)
                      policy.check_room(site.policy, site.state, bytes)
      before reply  → trail.record(payload, job, round, mu, charge=…)  mu: of the noise, None without
      any error     → policy.text_for_server(site.policy, error, reference) is all that leaves; the log has the rest

A payload that is asked for twice is sent from the state folder, never trained anew: fresh noise on the same data would
be a second release. A job's residuals are kept apart by the policy's privacy settings, since those from rounds without
noise are not covered.
"""
