package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strconv"
	"sync"
	"time"

	"github.com/gorilla/websocket"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	pb "google.golang.org/grpc/interop/grpc_testing"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
)

// serveWeb is an application that speaks HTTP/1 and HTTP/2 without TLS at one address and gRPC at another. Every answer says its name.
func serveWeb(name, addr, grpcAddr string) error {
	l, err := net.Listen("tcp", addr)
	if err != nil {
		return err
	}
	g, err := net.Listen("tcp", grpcAddr)
	if err != nil {
		return err
	}
	failed := make(chan error)
	srv := &http.Server{Handler: newWeb(name), Protocols: new(http.Protocols), ReadHeaderTimeout: time.Minute}
	srv.Protocols.SetHTTP1(true)
	srv.Protocols.SetUnencryptedHTTP2(true)
	go func() { failed <- srv.Serve(l) }()
	rpc := grpc.NewServer()
	pb.RegisterTestServiceServer(rpc, &rpcs{name: name})
	go func() { failed <- rpc.Serve(g) }()
	return <-failed
}

// web is the HTTP part.
type web struct {
	name string
	http.ServeMux

	mu sync.Mutex
	// guarded by mu:
	topics map[string]chan string
	count  map[string]int
}

func newWeb(name string) *web {
	w := &web{name: name, topics: map[string]chan string{}, count: map[string]int{}}
	w.HandleFunc("/", w.echo)
	w.HandleFunc("/stream", w.stream)
	w.HandleFunc("/bytes", bytesOf)
	w.HandleFunc("/status/{code}", func(rw http.ResponseWriter, r *http.Request) {
		code, _ := strconv.Atoi(r.PathValue("code"))
		rw.WriteHeader(code)
	})
	w.HandleFunc("/early", func(rw http.ResponseWriter, _ *http.Request) {
		rw.Header().Set("Link", "</style.css>; rel=preload")
		rw.WriteHeader(http.StatusEarlyHints)
		_, _ = io.WriteString(rw, "late")
	})
	w.HandleFunc("/abort", func(rw http.ResponseWriter, _ *http.Request) {
		_ = http.NewResponseController(rw).Flush()
		panic(http.ErrAbortHandler)
	})
	w.HandleFunc("/goaway", func(rw http.ResponseWriter, _ *http.Request) { rw.Header().Set("Connection", "close") })
	w.HandleFunc("/say/{topic}", func(rw http.ResponseWriter, r *http.Request) {
		b, _ := io.ReadAll(r.Body)
		select {
		case w.topic(r) <- string(b):
		case <-r.Context().Done():
		}
	})
	w.HandleFunc("/wait/{topic}", func(rw http.ResponseWriter, r *http.Request) {
		select {
		case s := <-w.topic(r):
			_, _ = io.WriteString(rw, s)
		case <-r.Context().Done():
		}
	})
	w.HandleFunc("/events/{topic}", w.events)
	w.HandleFunc("/count", func(rw http.ResponseWriter, r *http.Request) {
		w.mu.Lock()
		defer w.mu.Unlock()
		fmt.Fprint(rw, w.count[r.URL.Query().Get("path")])
	})
	w.HandleFunc("/ws", w.socket)
	w.HandleFunc("/browser", func(rw http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(rw, browserPage) })
	w.HandleFunc("/h2c", takeH2C)
	return w
}

// browserPage opens a WebSocket as somebody whom a cookie names, for scripts cannot set other fields of it, and says what came of it.
const browserPage = `<!doctype html><title>WebSocket</title><script>
document.cookie = "who=lou"
const got = [], socket = new WebSocket("ws://" + location.host + "/ws")
socket.onopen = () => socket.send("hello")
socket.onmessage = (e) => { got.push(e.data); socket.send("close") }
socket.onclose = (e) => fetch("/say/browser", {method: "POST", body: [...got, e.code, e.reason].join(" ")})
</script>
`

// ServeHTTP implements http.Handler.
func (w *web) ServeHTTP(rw http.ResponseWriter, r *http.Request) {
	w.mu.Lock()
	w.count[r.URL.Path]++
	w.mu.Unlock()
	rw.Header().Set("X-Name", w.name)
	w.ServeMux.ServeHTTP(rw, r)
}

func (w *web) topic(r *http.Request) chan string {
	w.mu.Lock()
	defer w.mu.Unlock()
	t := r.PathValue("topic")
	if w.topics[t] == nil {
		w.topics[t] = make(chan string)
	}
	return w.topics[t]
}

// echo answers with the whole body, and with a trailer what came as one. If the request says its length the answer does too.
func (w *web) echo(rw http.ResponseWriter, r *http.Request) {
	if r.ContentLength >= 0 {
		rw.Header().Set("Content-Length", fmt.Sprint(r.ContentLength))
	} else {
		rw.Header().Set("Trailer", "X-Seen")
	}
	b, err := io.ReadAll(r.Body)
	if err != nil {
		panic(http.ErrAbortHandler)
	}
	_, _ = rw.Write(b)
	if r.ContentLength < 0 {
		rw.Header().Set("X-Seen", r.Trailer.Get("X-Sent"))
	}
}

// stream answers with what comes, as it comes.
func (w *web) stream(rw http.ResponseWriter, r *http.Request) {
	rc := http.NewResponseController(rw)
	_ = rc.EnableFullDuplex() // HTTP/2 always is
	rw.Header().Set("Trailer", "X-Seen")
	_ = rc.Flush()
	b := make([]byte, 32<<10)
	for {
		n, err := r.Body.Read(b)
		if _, werr := rw.Write(b[:n]); werr != nil {
			return
		}
		_ = rc.Flush()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			panic(http.ErrAbortHandler)
		}
	}
	rw.Header().Set("X-Seen", r.Trailer.Get("X-Sent"))
}

// bytesOf answers with so many bytes.
func bytesOf(rw http.ResponseWriter, r *http.Request) {
	n, _ := strconv.Atoi(r.URL.Query().Get("n"))
	rw.Header().Set("Content-Length", fmt.Sprint(n))
	b := make([]byte, 64<<10)
	for n > 0 {
		k, err := rw.Write(b[:min(n, len(b))])
		if n -= k; err != nil {
			return
		}
	}
}

// events sends what is said about a topic as server-sent events.
func (w *web) events(rw http.ResponseWriter, r *http.Request) {
	rw.Header().Set("Content-Type", "text/event-stream")
	rc := http.NewResponseController(rw)
	_ = rc.Flush()
	for {
		select {
		case s := <-w.topic(r):
			fmt.Fprintf(rw, "data: %s\n\n", s)
			_ = rc.Flush()
		case <-r.Context().Done():
			return
		}
	}
}

// takeH2C says its protocol, and goes on in HTTP/2 when that is offered (RFC 7540, section 3.2); that it would is all that is looked at.
func takeH2C(rw http.ResponseWriter, r *http.Request) {
	if r.Header.Get("Upgrade") != "h2c" {
		fmt.Fprint(rw, r.Proto)
		return
	}
	c, _, err := http.NewResponseController(rw).Hijack()
	if err != nil {
		return
	}
	defer c.Close()
	_, _ = io.WriteString(c, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n")
}

// socket is a WebSocket that sends messages back, and ends with the code with which the client does.
func (w *web) socket(rw http.ResponseWriter, r *http.Request) {
	up := websocket.Upgrader{}
	c, err := up.Upgrade(rw, r, http.Header{"X-Name": {w.name}})
	if err != nil {
		return
	}
	defer c.Close()
	for {
		kind, b, err := c.ReadMessage()
		if err != nil {
			return
		}
		if string(b) == "close" { // now it is the server who ends
			_ = c.WriteControl(websocket.CloseMessage, websocket.FormatCloseMessage(4000, w.name), time.Now().Add(time.Second))
			continue
		}
		if c.WriteMessage(kind, b) != nil {
			return
		}
	}
}

// rpcs is the gRPC part.
type rpcs struct {
	pb.UnimplementedTestServiceServer
	name string
}

func (s *rpcs) header() metadata.MD { return metadata.Pairs("x-name", s.name) }

// UnaryCall sends the payload back, fails as it is asked to, or sleeps until nobody waits any more.
func (s *rpcs) UnaryCall(ctx context.Context, in *pb.SimpleRequest) (*pb.SimpleResponse, error) {
	_ = grpc.SetHeader(ctx, s.header())
	_ = grpc.SetTrailer(ctx, metadata.Pairs("x-trailer", s.name))
	if want := in.GetResponseStatus(); want != nil {
		if want.GetCode() == int32(codes.DeadlineExceeded) {
			<-ctx.Done()
			return nil, ctx.Err()
		}
		st, err := status.New(codes.Code(want.GetCode()), want.GetMessage()).WithDetails(&pb.Payload{Body: []byte("details of " + s.name)})
		if err != nil {
			return nil, err
		}
		return nil, st.Err()
	}
	return &pb.SimpleResponse{Payload: in.GetPayload(), ServerId: s.name}, nil
}

// StreamingOutputCall sends payloads of the sizes that it is asked for.
func (s *rpcs) StreamingOutputCall(in *pb.StreamingOutputCallRequest, out pb.TestService_StreamingOutputCallServer) error {
	_ = out.SetHeader(s.header())
	for _, p := range in.GetResponseParameters() {
		if err := out.Send(&pb.StreamingOutputCallResponse{Payload: &pb.Payload{Body: make([]byte, p.GetSize())}}); err != nil {
			return err
		}
	}
	return nil
}

// StreamingInputCall adds up the sizes of what comes.
func (s *rpcs) StreamingInputCall(in pb.TestService_StreamingInputCallServer) error {
	_ = in.SetHeader(s.header())
	sum := int32(0)
	for {
		m, err := in.Recv()
		if errors.Is(err, io.EOF) {
			return in.SendAndClose(&pb.StreamingInputCallResponse{AggregatedPayloadSize: sum})
		}
		if err != nil {
			return err
		}
		sum += int32(len(m.GetPayload().GetBody()))
	}
}

// FullDuplexCall sends payloads back as they come.
func (s *rpcs) FullDuplexCall(both pb.TestService_FullDuplexCallServer) error {
	_ = both.SendHeader(s.header())
	for {
		m, err := both.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if err := both.Send(&pb.StreamingOutputCallResponse{Payload: m.GetPayload()}); err != nil {
			return err
		}
	}
}
