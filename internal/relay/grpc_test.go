package relay

import (
	"bytes"
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	pb "google.golang.org/grpc/interop/grpc_testing"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/doppel-dev/doppel/internal/match"
	"github.com/doppel-dev/doppel/internal/relayapi"
)

// errNotKnown is what an older traffic-manager says to a wish for HTTP/2.
var errNotKnown = errors.New("1 bytes after the header")

// rpcApp is a gRPC server that sends back what it gets.
type rpcApp struct {
	pb.UnimplementedTestServiceServer
	open  atomic.Int32 // calls of which the app knows
	marks sync.Map     // of requests: the IDs of previews
}

func (a *rpcApp) head(ctx context.Context) {
	md, _ := metadata.FromIncomingContext(ctx)
	a.marks.Store(strings.Join(md.Get(match.PreviewHeader), ","), true)
}

func (a *rpcApp) UnaryCall(ctx context.Context, r *pb.SimpleRequest) (*pb.SimpleResponse, error) {
	a.head(ctx)
	if st := r.GetResponseStatus(); st.GetCode() == int32(codes.DeadlineExceeded) { // it is waited for
		a.open.Add(1)
		defer a.open.Add(-1)
		<-ctx.Done()
		return nil, status.FromContextError(ctx.Err()).Err()
	} else if st != nil {
		s, err := status.New(codes.Code(st.GetCode()), st.GetMessage()).WithDetails(&pb.Payload{Body: []byte("details")})
		if err != nil {
			return nil, err
		}
		_ = grpc.SetTrailer(ctx, metadata.Pairs("x-trailer", "of an error"))
		return nil, s.Err()
	}
	_ = grpc.SetHeader(ctx, metadata.Pairs("x-header", "head"))
	_ = grpc.SetTrailer(ctx, metadata.Pairs("x-trailer", "tail"))
	return &pb.SimpleResponse{Payload: r.GetPayload()}, nil
}

func (a *rpcApp) StreamingOutputCall(r *pb.StreamingOutputCallRequest, s pb.TestService_StreamingOutputCallServer) error {
	for _, p := range r.GetResponseParameters() {
		if err := s.Send(&pb.StreamingOutputCallResponse{Payload: &pb.Payload{Body: make([]byte, p.GetSize())}}); err != nil {
			return err
		}
	}
	return nil
}

func (a *rpcApp) StreamingInputCall(s pb.TestService_StreamingInputCallServer) error {
	sum := int32(0)
	for {
		m, err := s.Recv()
		if errors.Is(err, io.EOF) {
			return s.SendAndClose(&pb.StreamingInputCallResponse{AggregatedPayloadSize: sum})
		}
		if err != nil {
			return err
		}
		sum += int32(len(m.GetPayload().GetBody()))
	}
}

func (a *rpcApp) FullDuplexCall(s pb.TestService_FullDuplexCallServer) error {
	a.open.Add(1)
	defer a.open.Add(-1)
	for {
		m, err := s.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if err := s.Send(&pb.StreamingOutputCallResponse{Payload: m.GetPayload()}); err != nil {
			return err
		}
	}
}

// counted counts the connections that a listener accepts.
type counted struct {
	net.Listener
	n atomic.Int32
}

func (c *counted) Accept() (net.Conn, error) {
	conn, err := c.Listener.Accept()
	if err == nil {
		c.n.Add(1)
	}
	return conn, err
}

// tlsFlow is a connection to an ingress that speaks TLS.
type tlsFlow struct{ *tls.Conn }

func (t tlsFlow) Reset() { _ = t.NetConn().Close() }

// overTLS connects as a traffic-manager does to an ingress that speaks TLS.
func overTLS(addr string) func(bool) (net.Conn, string, error) {
	return func(http2 bool) (net.Conn, string, error) {
		cfg := &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"http/1.1"}}
		if http2 {
			cfg.NextProtos = []string{"h2", "http/1.1"}
		}
		c, err := tls.Dial("tcp", addr, cfg)
		if err != nil {
			return nil, "", err
		}
		return tlsFlow{c}, cmp.Or(c.ConnectionState().NegotiatedProtocol, "http/1.1"), nil
	}
}

// rpcWorld is a published preview, and a gRPC client of it.
func rpcWorld(t *testing.T, ingress func(http2 bool) (net.Conn, string, error), app http.HandlerFunc) (*world, relayapi.Preview, pb.TestServiceClient) {
	t.Helper()
	w := newWorld(t)
	ann := w.first("ann@example.com").login()
	c := ann.cluster("prod", app)
	c.ingress = ingress
	p := ann.preview(c, "web")
	ann.must(relayapi.PathPublishPreview, relayapi.PublishRequest{Preview: p.Host, Public: true}, nil)
	conn, err := grpc.NewClient("passthrough:///"+p.Host+"."+domain, grpc.WithTransportCredentials(credentials.NewTLS(&tls.Config{RootCAs: w.roots})),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "tcp", w.addr)
		}))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return w, p, pb.NewTestServiceClient(conn)
}

// gRPC goes through a preview as it is: each kind of call, headers, trailers, errors with details, deadlines and cancelled calls, side by side on one
// connection to the ingress, whether that agrees on HTTP/2 in TLS or is spoken to in it as gRPC does inside a cluster.
func TestGRPC(t *testing.T) {
	for _, secure := range []bool{false, true} {
		t.Run(fmt.Sprintf("TLS=%v", secure), func(t *testing.T) {
			app := &rpcApp{}
			l := &counted{Listener: listen(t)}
			ingress := func(bool) (net.Conn, string, error) {
				c, err := net.Dial("tcp", l.Addr().String())
				return c, "", err
			}
			var opts []grpc.ServerOption
			if secure {
				cert := httptest.NewUnstartedServer(nil)
				cert.StartTLS()
				defer cert.Close()
				opts = append(opts, grpc.Creds(credentials.NewServerTLSFromCert(&cert.TLS.Certificates[0])))
				ingress = overTLS(l.Addr().String())
			}
			srv := grpc.NewServer(opts...)
			pb.RegisterTestServiceServer(srv, app)
			go func() { _ = srv.Serve(l) }()
			t.Cleanup(srv.Stop)
			w, p, c := rpcWorld(t, ingress, echo)
			ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
			defer cancel()

			open, err := c.FullDuplexCall(ctx) // it is there all the time
			if err != nil {
				t.Fatal(err)
			}
			if err := again(open, 1); err != nil {
				t.Fatal(err)
			}
			var wg sync.WaitGroup
			for name, row := range rpcRows {
				for range 5 {
					wg.Go(func() {
						if err := row(ctx, c); err != nil {
							t.Errorf("%s: %v", name, err)
						}
					})
				}
			}
			wg.Wait()
			w.until("the app is told of deadlines and of what was cancelled, too", func() bool { return app.open.Load() == 1 })
			if err := again(open, 300_000); err != nil {
				t.Errorf("the one beside them: %v", err)
			}
			if err := open.CloseSend(); err != nil {
				t.Error(err)
			}
			if _, err := open.Recv(); !errors.Is(err, io.EOF) {
				t.Error(err)
			}
			if n := l.n.Load(); n != 1 {
				t.Errorf("%d connections to the ingress", n)
			}
			app.marks.Range(func(id, _ any) bool {
				if id != p.ID {
					t.Errorf("marked %q, want %q", id, p.ID)
				}
				return true
			})
		})
	}
}

// again sends a message and waits for it to come back.
func again(s pb.TestService_FullDuplexCallClient, n int) error {
	body := bytes.Repeat([]byte{byte(n)}, n)
	if err := s.Send(&pb.StreamingOutputCallRequest{Payload: &pb.Payload{Body: body}}); err != nil {
		return err
	}
	m, err := s.Recv()
	if err != nil || !bytes.Equal(m.GetPayload().GetBody(), body) {
		return fmt.Errorf("%d bytes of %d came back, %w", len(m.GetPayload().GetBody()), n, err)
	}
	return nil
}

var rpcRows = map[string]func(context.Context, pb.TestServiceClient) error{
	"unary": func(ctx context.Context, c pb.TestServiceClient) error {
		for _, n := range []int{0, 10, 3 << 20} {
			var header, trailer metadata.MD
			m, err := c.UnaryCall(ctx, &pb.SimpleRequest{Payload: &pb.Payload{Body: make([]byte, n)}}, grpc.Header(&header), grpc.Trailer(&trailer))
			if err != nil || len(m.GetPayload().GetBody()) != n || fmt.Sprint(header["x-header"], trailer["x-trailer"]) != "[head] [tail]" {
				return fmt.Errorf("%d of %d bytes, %v, %v, %w", len(m.GetPayload().GetBody()), n, header, trailer, err)
			}
		}
		return nil
	},
	"server stream": func(ctx context.Context, c pb.TestServiceClient) error {
		var ask pb.StreamingOutputCallRequest
		for n := range int32(40) {
			ask.ResponseParameters = append(ask.ResponseParameters, &pb.ResponseParameters{Size: n * n * 60})
		}
		s, err := c.StreamingOutputCall(ctx, &ask)
		if err != nil {
			return err
		}
		for _, p := range ask.GetResponseParameters() {
			if m, err := s.Recv(); err != nil || len(m.GetPayload().GetBody()) != int(p.GetSize()) {
				return fmt.Errorf("%d of %d bytes, %w", len(m.GetPayload().GetBody()), p.GetSize(), err)
			}
		}
		if _, err := s.Recv(); !errors.Is(err, io.EOF) {
			return fmt.Errorf("after the last: %w", err)
		}
		return nil
	},
	"client stream": func(ctx context.Context, c pb.TestServiceClient) error {
		s, err := c.StreamingInputCall(ctx)
		if err != nil {
			return err
		}
		for range 40 {
			if err := s.Send(&pb.StreamingInputCallRequest{Payload: &pb.Payload{Body: make([]byte, 5000)}}); err != nil {
				return err
			}
		}
		if m, err := s.CloseAndRecv(); err != nil || m.GetAggregatedPayloadSize() != 200_000 {
			return fmt.Errorf("%d bytes, %w", m.GetAggregatedPayloadSize(), err)
		}
		return nil
	},
	"both": func(ctx context.Context, c pb.TestServiceClient) error {
		s, err := c.FullDuplexCall(ctx)
		if err != nil {
			return err
		}
		for n := range 40 { // each is answered before the next is sent
			if err := again(s, n*n*60); err != nil {
				return err
			}
		}
		return s.CloseSend()
	},
	"error": func(ctx context.Context, c pb.TestServiceClient) error {
		const msg = "\t\nwith whitespace\r\nand Unicode \u263a \U0001f608\n"
		var trailer metadata.MD
		_, err := c.UnaryCall(ctx, &pb.SimpleRequest{ResponseStatus: &pb.EchoStatus{Code: int32(codes.FailedPrecondition), Message: msg}}, grpc.Trailer(&trailer))
		st := status.Convert(err)
		if st.Code() != codes.FailedPrecondition || st.Message() != msg || len(st.Details()) != 1 || fmt.Sprint(trailer["x-trailer"]) != "[of an error]" {
			return fmt.Errorf("%v, trailer %v: %w", st.Details(), trailer, err)
		}
		return nil
	},
	"unknown": func(ctx context.Context, c pb.TestServiceClient) error {
		_, err := c.UnimplementedCall(ctx, &pb.Empty{})
		return wantCode(err, codes.Unimplemented)
	},
	"deadline": func(ctx context.Context, c pb.TestServiceClient) error {
		ctx, cancel := context.WithTimeout(ctx, 300*time.Millisecond)
		defer cancel()
		_, err := c.UnaryCall(ctx, &pb.SimpleRequest{ResponseStatus: &pb.EchoStatus{Code: int32(codes.DeadlineExceeded)}})
		return wantCode(err, codes.DeadlineExceeded)
	},
	"cancel": func(ctx context.Context, c pb.TestServiceClient) error {
		ctx, cancel := context.WithCancel(ctx)
		defer cancel()
		s, err := c.FullDuplexCall(ctx)
		if err == nil {
			err = again(s, 10)
		}
		if err != nil {
			return err
		}
		cancel()
		_, err = s.Recv()
		return wantCode(err, codes.Canceled)
	},
}

func wantCode(err error, want codes.Code) error {
	if got := status.Code(err); got != want {
		return fmt.Errorf("%v, want %v: %w", got, want, err)
	}
	return nil
}

// A server resets a call whose time is over: that is no failure of the way to it.
func TestGRPCDeadline(t *testing.T) {
	const takes = 60 * time.Millisecond
	ingress := httptest.NewUnstartedServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {
		time.Sleep(takes)
		panic(http.ErrAbortHandler)
	}))
	ingress.EnableHTTP2 = true
	ingress.Config.ErrorLog = log.New(io.Discard, "", 0)
	ingress.StartTLS()
	t.Cleanup(ingress.Close)
	w, p, _ := rpcWorld(t, overTLS(ingress.Listener.Addr().String()), echo)
	tr := &http.Transport{DialContext: w.dial, TLSClientConfig: &tls.Config{RootCAs: w.roots}, ForceAttemptHTTP2: true}
	t.Cleanup(tr.CloseIdleConnections)
	for timeout, want := range map[string]string{
		"50m": "4", "1u": "4", "59999u": "4", "1n": "4", "10S": "14", "1H": "14", "99999999H": "14", "": "14", "m": "14", "-5m": "14", "50x": "14", "1000000000n": "14",
	} {
		req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, p.URL, strings.NewReader(""))
		if err != nil {
			t.Fatal(err)
		}
		req.Header = http.Header{"Content-Type": {"application/grpc"}, "Grpc-Timeout": {timeout}, "Te": {"trailers"}}
		resp, err := (&http.Client{Transport: tr, Timeout: 10 * time.Second}).Do(req)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.Copy(io.Discard, resp.Body); err != nil {
			t.Error(err)
		}
		_ = resp.Body.Close()
		if got := cmp.Or(resp.Header.Get("Grpc-Status"), resp.Trailer.Get("Grpc-Status")); got != want {
			t.Errorf("timeout %q: status %s, want %s", timeout, got, want)
		}
	}
}

// An ingress that does not speak HTTP/2 is told from one that is not there; in TLS, and by an older traffic-manager, HTTP/1.1 it is.
func TestGRPCWithoutHTTP2(t *testing.T) {
	http1 := func(rw http.ResponseWriter, r *http.Request) { // an ingress that makes gRPC of it
		rw.Header().Set("Content-Type", "application/grpc")
		rw.Header().Set("Trailer", "Grpc-Status, Grpc-Message")
		n, err := io.Copy(io.Discard, r.Body)
		rw.Header().Set("X-Request", fmt.Sprint(r.Proto, " ", n, " ", err))
		_, _ = rw.Write(make([]byte, 5)) // an empty message
		rw.Header().Set("Grpc-Status", "0")
		rw.Header().Set("Grpc-Message", "")
	}
	plain, secure := httptest.NewServer(http.HandlerFunc(http1)), httptest.NewTLSServer(http.HandlerFunc(http1))
	t.Cleanup(plain.Close)
	t.Cleanup(secure.Close)
	silent := listen(t)
	t.Cleanup(func() { silent.Close() })
	to := func(l net.Listener) func(bool) (net.Conn, string, error) {
		return func(bool) (net.Conn, string, error) {
			c, err := net.Dial("tcp", l.Addr().String())
			return c, "", err
		}
	}
	for name, tt := range map[string]struct {
		ingress func(bool) (net.Conn, string, error)
		says    string // "": it is answered
	}{
		"no TLS": {to(plain.Listener), "does not speak HTTP/2 without TLS"},
		"silent": {to(silent), "does not speak HTTP/2 without TLS"},
		"TLS":    {overTLS(secure.Listener.Addr().String()), ""},
		"older manager": {func(http2 bool) (net.Conn, string, error) {
			if http2 {
				return nil, "", errNotKnown
			}
			return to(plain.Listener)(false)
		}, ""},
		"away": {func(bool) (net.Conn, string, error) { return nil, "", errors.New("nobody") }, "ingress could not be reached"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			_, _, c := rpcWorld(t, tt.ingress, echo)
			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
			defer cancel()
			var header metadata.MD
			_, err := c.UnaryCall(ctx, &pb.SimpleRequest{Payload: &pb.Payload{Body: make([]byte, 100_000)}}, grpc.Header(&header))
			if tt.says == "" {
				if err != nil || fmt.Sprint(header["x-request"]) != "[HTTP/1.1 100013 <nil>]" {
					t.Errorf("%v %v", header, err)
				}
			} else if status.Code(err) != codes.Unavailable || !strings.Contains(err.Error(), tt.says) {
				t.Errorf("%v, want %q", err, tt.says)
			}
		})
	}
}

// Trailers of requests reach the app, by whichever version of HTTP.
func TestRequestTrailers(t *testing.T) {
	app := func(rw http.ResponseWriter, r *http.Request) {
		b, err := io.ReadAll(r.Body)
		fmt.Fprintf(rw, "%s %s %v %s", r.Proto, b, err, r.Trailer.Get("X-Sum"))
	}
	plain, secure := httptest.NewServer(http.HandlerFunc(app)), httptest.NewUnstartedServer(http.HandlerFunc(app))
	secure.EnableHTTP2 = true
	secure.StartTLS()
	t.Cleanup(plain.Close)
	t.Cleanup(secure.Close)
	for name, tt := range map[string]struct {
		ingress func(bool) (net.Conn, string, error)
		want    string
	}{
		"no TLS": {func(bool) (net.Conn, string, error) {
			c, err := net.Dial("tcp", plain.Listener.Addr().String())
			return c, "", err
		}, "HTTP/1.1 hello <nil> 5"},
		"TLS": {overTLS(secure.Listener.Addr().String()), "HTTP/2.0 hello <nil> 5"},
	} {
		t.Run(name, func(t *testing.T) {
			w, p, _ := rpcWorld(t, tt.ingress, echo)
			tr := &http.Transport{DialContext: w.dial, TLSClientConfig: &tls.Config{RootCAs: w.roots}, ForceAttemptHTTP2: true}
			t.Cleanup(tr.CloseIdleConnections)
			req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, p.URL, io.MultiReader(strings.NewReader("hello")))
			if err != nil {
				t.Fatal(err)
			}
			req.Trailer = http.Header{"X-Sum": {"5"}}
			resp, err := (&http.Client{Transport: tr, Timeout: 10 * time.Second}).Do(req)
			if err != nil {
				t.Fatal(err)
			}
			defer resp.Body.Close()
			if b, err := io.ReadAll(resp.Body); string(b) != tt.want || err != nil {
				t.Errorf("%q %v, want %q", b, err, tt.want)
			}
		})
	}
}
