package relay

import (
	"context"
	"net/http"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/doppel-dev/doppel/internal/relay/links"
	"github.com/doppel-dev/doppel/internal/relay/preview"
	"github.com/doppel-dev/doppel/internal/relay/store"
)

// metrics are the relay's own.
type metrics struct {
	registry *prometheus.Registry
	requests *prometheus.CounterVec
}

func newMetrics(l *links.Links, p *preview.Handler, c certificates) *metrics {
	m := &metrics{
		registry: prometheus.NewRegistry(),
		requests: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "doppel_relay_requests_total", Help: "Requests, by where their host leads."}, []string{"to"}),
	}
	m.registry.MustRegister(
		m.requests, collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}),
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "doppel_relay_open_requests", Help: "Requests of previews that are open, WebSockets too."}, func() float64 { return float64(p.Open()) }),
		prometheus.NewCounterFunc(prometheus.CounterOpts{Name: "doppel_relay_visits_unlisted_total", Help: "Visits that were too many at once to be listed."}, func() float64 { return float64(p.Unlisted()) }),
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "doppel_relay_links", Help: "Traffic-managers that are connected."}, func() float64 { return float64(l.Len()) }),
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "doppel_relay_certificate_expiry_timestamp_seconds", Help: "When the certificate ends, in Unix time; 0: there is none."}, func() float64 {
			end, err := c.Expires()
			if err != nil {
				return 0
			}
			return float64(end.Unix())
		}),
	)
	return m
}

// health is the plain port: is it well, and its metrics.
func (r *Relay) health() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /healthz", func(http.ResponseWriter, *http.Request) {})
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, req *http.Request) {
		ctx, cancel := context.WithTimeout(req.Context(), store.Patience)
		defer cancel()
		if _, err := r.store.Revision(ctx); err != nil {
			http.Error(w, "the database does not answer", http.StatusServiceUnavailable)
		} else if _, err := r.certs.Expires(); err != nil {
			http.Error(w, err.Error(), http.StatusServiceUnavailable)
		}
	})
	mux.Handle("GET /metrics", promhttp.HandlerFor(r.metrics.registry, promhttp.HandlerOpts{}))
	return mux
}
