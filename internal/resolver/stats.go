package resolver

import "sync/atomic"

// Stats counts what a Server did since New.
type Stats struct {
	Queries        uint64 `json:"queries"`
	Malformed      uint64 `json:"malformed"` // answered with FORMERR, or not at all
	Failed         uint64 `json:"failed"`    // answered with SERVFAIL of our own
	Cluster        uint64 `json:"cluster"`   // for the cluster's names
	Upstream       uint64 `json:"upstream"`  // for all others
	CacheHits      uint64 `json:"cacheHits"`
	CacheEntries   int    `json:"cacheEntries"`
	Joined         uint64 `json:"joined"`         // shared the answer of a question already on its way
	ClusterQueries uint64 `json:"clusterQueries"` // really sent to the cluster
	ClusterErrors  uint64 `json:"clusterErrors"`
	UpstreamErrors uint64 `json:"upstreamErrors"` // no upstream gave any answer
}

type counters struct {
	queries, malformed, failed, cluster, upstream, cacheHits, joined atomic.Uint64
	clusterQueries, clusterErrors, upstreamErrors                    atomic.Uint64
}

// Stats returns the counters.
func (s *Server) Stats() Stats {
	c := &s.stats
	return Stats{
		Queries:        c.queries.Load(),
		Malformed:      c.malformed.Load(),
		Failed:         c.failed.Load(),
		Cluster:        c.cluster.Load(),
		Upstream:       c.upstream.Load(),
		CacheHits:      c.cacheHits.Load(),
		CacheEntries:   s.cache.len(),
		Joined:         c.joined.Load(),
		ClusterQueries: c.clusterQueries.Load(),
		ClusterErrors:  c.clusterErrors.Load(),
		UpstreamErrors: c.upstreamErrors.Load(),
	}
}
