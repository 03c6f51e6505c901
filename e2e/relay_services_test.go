package e2e

import (
	"context"
	"crypto/tls"
	"net"
	"net/url"
	"regexp"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	pb "google.golang.org/grpc/interop/grpc_testing"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
)

// services has services intercepted that are not the ones which a link leads to first, or that speak gRPC.
func (r *relay) services(l *laptop, b *browser, ns string) {
	t, c := r.t, r.c
	t.Helper()
	bin := c.probe(t)
	c.workload(t, ns, taken{
		name: "web", kind: "Deployment", run: []string{"web", "app", ":7000", ":7001"},
		ports: []corev1.ContainerPort{{Name: "http", ContainerPort: 7000}, {Name: "grpc", ContainerPort: 7001}},
		service: &corev1.ServiceSpec{Ports: []corev1.ServicePort{
			{Name: "http", Port: 80, TargetPort: intstr.FromString("http")}, {Name: "grpc", Port: 81, TargetPort: intstr.FromString("grpc")},
		}},
	})
	carriers := []string{"baggage", "tracestate"}
	for _, carrier := range carriers { // a service whose app passes on nothing but this
		c.workload(t, ns, taken{
			name: "front-" + carrier, kind: "Deployment", run: []string{"front", ":7000", "http://web/", carrier},
			service: &corev1.ServiceSpec{Ports: []corev1.ServicePort{{Port: 80, TargetPort: intstr.FromInt32(7000)}}},
		})
	}
	for _, d := range []string{"web", "front-baggage", "front-tracestate"} {
		c.available(t, ns, d)
	}
	l.start(t, bin, "web", "lou", "127.0.0.1:3100", "127.0.0.1:3101")
	link := regexp.MustCompile(`https://\S+`)

	// The ID of a preview is in a header that apps with tracing pass on, and the service behind knows the request by that.
	for _, carrier := range carriers {
		at := link.FindString(l.run(t, "doppel", "intercept", "web", "-p", "3100:http", "--preview-url", "--preview-propagate", carrier, "--ingress-host", "front-"+carrier+"."+ns, "--ingress-port", "80"))
		b.sees("a service behind another, by "+carrier, 10*time.Second, at, "answered by lou")
		for range 5 {
			if got, err := c.lab("node", "exec", "--", "curl", "-s", "-m", "3", "http://"+c.clusterIP(t, ns, "front-"+carrier)); !strings.Contains(got, "answered by app") {
				t.Errorf("%s, without a preview: %q %v", carrier, got, err)
			}
		}
		want(t, l.run(t, "doppel", "leave", "web"), "Left")
	}

	// gRPC, in HTTP/2 all the way; the service itself is where requests enter the cluster.
	at := link.FindString(l.run(t, "doppel", "intercept", "rpc", "-w", "web", "-p", "3101:grpc", "--preview-url", "--ingress-host", "web."+ns, "--ingress-port", "81"))
	want(t, l.run(t, "doppel", "preview", "publish", "rpc"), "everybody who has the link")
	u, err := url.Parse(at)
	if err != nil {
		t.Fatal(err)
	}
	dial := func(creds grpc.DialOption, host string, dial func(context.Context) (net.Conn, error)) pb.TestServiceClient {
		conn, err := grpc.NewClient("passthrough:///"+host, creds, grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return dial(ctx) }))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { conn.Close() })
		return pb.NewTestServiceClient(conn)
	}
	visitor := dial(grpc.WithTransportCredentials(credentials.NewTLS(&tls.Config{RootCAs: r.roots})), u.Host, func(ctx context.Context) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "tcp", r.addr)
	})
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	eventually(t, 10*time.Second, func() error { return unary(ctx, visitor, "lou") })
	var wg sync.WaitGroup
	for name, row := range rpcRows {
		for range 3 {
			wg.Go(func() {
				if err := row(ctx, visitor, "lou"); err != nil {
					t.Errorf("gRPC through the link, %s: %v", name, err)
				}
			})
		}
	}
	wg.Wait()
	inside := &requests{grpc: strings.TrimSuffix(c.clusterIP(t, ns, "web"), "80") + "81", dial: c.dialer(t)}
	others, _ := inside.rpcClient(t)
	if err := unary(ctx, others, ""); err != nil {
		t.Errorf("everybody else: %v", err)
	}
	want(t, l.run(t, "doppel", "leave", "rpc"), "Left")
}
