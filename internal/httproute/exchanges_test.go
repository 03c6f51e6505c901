package httproute

import (
	"strings"
	"testing"
)

func TestExchanges(t *testing.T) {
	const get, post = "GET / HTTP/1.1\r\nHost: a\r\n\r\n", "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\n"
	const sized, chunked = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nab", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n0\r\n\r\n"
	for _, tt := range []struct {
		name    string
		said    []string // the client and the server by turns
		between bool
	}{
		{"nothing", nil, false},
		{"a request", []string{get}, false},
		{"an answer", []string{get, sized}, true},
		{"two", []string{get, sized, get, chunked}, true},
		{"the next request", []string{get, sized, get}, false},
		{"half an answer", []string{get, sized[:len(sized)-1]}, false},
		{"half a chunked answer", []string{get, chunked[:len(chunked)-1]}, false},
		{"half a head", []string{get, sized[:20]}, false},
		{"no body", []string{get, "HTTP/1.1 204 No Content\r\n\r\n"}, true},
		{"of HEAD", []string{"HEAD / HTTP/1.1\r\nHost: a\r\n\r\n", "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n"}, true},
		{"a body", []string{post + "abc", sized}, true},
		{"a body in pieces", []string{post + "a", "", "bc", sized}, true},
		{"a chunked body", []string{"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n", "", "0\r\n\r\n", sized}, true},
		{"answered before its body", []string{post + "a", sized}, false},
		{"and what may be the rest", []string{post + "a", sized, "bc", sized}, false},
		{"100 Continue", []string{post, "HTTP/1.1 100 Continue\r\n\r\n", "abc", sized}, true},
		{"103 and an answer at once", []string{get, "HTTP/1.1 103 Early Hints\r\n\r\n" + sized}, true},
		{"a pipeline", []string{get + get, sized + sized}, false},
		{"a pipeline while it is answered", []string{get, sized[:10], get, sized[10:] + sized}, false},
		{"a request's head in pieces", []string{get[:9], "", get[9:], sized}, false},
		{"to the end of the connection", []string{get, "HTTP/1.1 200 OK\r\n\r\nab"}, false},
		{"events", []string{get, "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n"}, false},
		{"the server's last", []string{get, "HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nab"}, false},
		{"the client's last", []string{"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n", sized}, false},
		{"WebSocket", []string{"GET / HTTP/1.1\r\nHost: a\r\nUpgrade: websocket\r\nConnection: upgrade\r\n\r\n", "HTTP/1.1 101 Switching Protocols\r\n\r\n"}, false},
		{"CONNECT", []string{"CONNECT a:1 HTTP/1.1\r\nHost: a:1\r\n\r\n", "HTTP/1.1 200 OK\r\n\r\n"}, false},
		{"another protocol", []string{"HELO a\r\n", "250 a\r\n"}, false},
		{"the server speaks first", []string{"", "220 a\r\n", get, sized}, false},
		{"a long head", []string{get, "HTTP/1.1 200 OK\r\nA: " + strings.Repeat("a", maxAnswerHead/2) + "\r\n" + sized[17:]}, true},
		{"more than was asked for", []string{get, sized + "c"}, false},
		{"more than was asked for, later", []string{get, sized, "", sized, get, sized}, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			for _, size := range []int{1 << 20, 1, 7} { // of the server's pieces
				var x Exchanges
				for i, s := range tt.said {
					if i%2 == 0 {
						x.Asked([]byte(s))
						continue
					}
					for len(s) > 0 {
						k := min(size, len(s))
						x.Answered([]byte(s[:k]))
						if size == 7 { // of which less is passed on at first
							x.Again(k / 2)
							if x.Between() && k > 1 {
								t.Error("between, and bytes are to come")
							}
							x.Answered([]byte(s[k-k/2 : k]))
						}
						s = s[k:]
					}
				}
				if x.Between() != tt.between {
					t.Errorf("pieces of %d: %v", size, x.Between())
				}
			}
		})
	}
}

// A head that comes byte by byte is not looked at from its beginning with each, and not held without an end.
func TestExchangesDribble(t *testing.T) {
	var x Exchanges
	x.Asked([]byte("GET / HTTP/1.1\r\nHost: a\r\n\r\n"))
	x.Answered([]byte("HTTP/1.1 200 OK\r\n"))
	for range maxAnswerHead {
		x.Answered([]byte("a"))
	}
	if !x.lost || x.head != nil {
		t.Errorf("%d bytes are held", len(x.head))
	}
	x = Exchanges{}
	x.Resume()
	if !x.Between() || x.Amid() {
		t.Error("another server's next exchange has begun")
	}
	x.Asked([]byte("GET / HTTP/1.1\r\nHost: a\r\n\r\n"))
	if x.Between() || !x.Amid() {
		t.Error("and has not")
	}
}
