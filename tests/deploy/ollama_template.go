// Renders templates as Ollama does: a JSON list of templates and messages comes in, the list of texts goes out.
package main

import (
	"encoding/json"
	"os"
	"strings"
	"text/template"
)

type Message struct{ Role, Content string }

func main() {
	var asked []struct {
		Template string
		Messages []*Message
	}
	if err := json.NewDecoder(os.Stdin).Decode(&asked); err != nil {
		panic(err)
	}
	texts := []string{}
	for _, one := range asked {
		system := ""
		for _, message := range one.Messages {
			if message.Role == "system" {
				system += message.Content
			}
		}
		var text strings.Builder
		parsed := template.Must(template.New("").Option("missingkey=zero").Parse(one.Template))
		data := map[string]any{"System": system, "Messages": one.Messages, "Response": ""}
		if err := parsed.Execute(&text, data); err != nil {
			panic(err)
		}
		texts = append(texts, text.String())
	}
	json.NewEncoder(os.Stdout).Encode(texts)
}
